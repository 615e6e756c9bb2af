"""Loading a checkpoint: each rank reads only its slices, and one that does not fit is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import Part, ThreadLane, make_checkpoint
from safetensors.torch import load_file, save_file

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.stages.collectives import TensorShard
from stagemesh.stages.models.registry import known_architectures, model_class
from stagemesh.stages.runner import ModelRunner
from stagemesh.stages.weights import Checkpoint

IDS = list(range(20))


def runner(folder: Path) -> ModelRunner:
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128))
    return ModelRunner(config, 0, 0, torch.device("cpu"))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path)


def test_a_sharded_checkpoint_gives_what_a_single_file_gives(folder: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3

    part = Part(IDS, 0, [3, 1, 4, 0, 2])
    torch.testing.assert_close(ThreadLane(sharded).logits(part), ThreadLane(folder).logits(part))


@pytest.mark.parametrize("tp, layers", [(2, (0, 3)), (4, (0, 3)), (2, (0, 1)), (2, (1, 3)), (1, (1, 2))])
def test_a_rank_reads_only_its_slices(folder: Path, tp: int, layers: tuple[int, int]) -> None:
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128)).model
    hidden, inner, dim, vocab = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.vocab_size,
    )
    heads, kv_heads = config.num_heads // tp, max(1, config.num_kv_heads // tp)
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner // tp + 2 * hidden
    expected = layer * (layers[1] - layers[0])
    expected += (layers[0] == 0) * vocab // tp * hidden
    expected += (layers[1] == 3) * (vocab // tp * hidden + hidden)

    for rank in range(tp):
        with Checkpoint(folder, torch.float32) as checkpoint:
            unused = model_class(config.architecture)(config, layers, TensorShard(rank, tp)).load(checkpoint)
        assert checkpoint.bytes_read == 4 * expected
        assert unused == []


def test_a_tied_head_reads_the_embedding_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128)).model
    with Checkpoint(folder, torch.float32) as checkpoint:
        model_class(config.architecture)(config, (0, 3), TensorShard()).load(checkpoint)
    assert checkpoint.bytes_read == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        runner(folder).load()


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(63)

    change_tensors(folder, shrink)
    with pytest.raises(ConfigError, match=r"'model\.norm\.weight' in model\.safetensors has shape \[63\].*\[64\]"):
        runner(folder).load()


def test_a_truncated_file_is_refused(folder: Path) -> None:
    loading = runner(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated"):
        loading.load()


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, max_shard_size="40KB")
    loading = runner(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} is missing"):
        loading.load()


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, max_shard_size="40KB")
    loading = runner(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight"
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"'{name}'"):
        loading.load()


def test_a_pickle_checkpoint_is_refused(folder: Path) -> None:
    loading = runner(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        loading.load()


def test_unknown_tensors_are_reported_and_harmless_ones_are_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(4)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(4)

    change_tensors(folder, add)
    with caplog.at_level(logging.WARNING):
        runner(folder).load()

    assert "model.layers.0.self_attn.extra.weight" in caplog.text
    assert "model.layers.7.mlp.up_proj.weight" in caplog.text
    assert "inv_freq" not in caplog.text


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"):
        model_class("GPT2LMHeadModel")
    assert "Qwen3ForCausalLM" in known_architectures()
