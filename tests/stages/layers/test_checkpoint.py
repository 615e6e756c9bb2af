"""Loading a checkpoint: each rank reads only its slices, and one that does not fit is refused by name."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_folder import write_model_folder
from support.model_harness import Part, ThreadLane, make_checkpoint

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.tensor_parallel import TensorShard
from stagemesh.stages.models.decoder import Decoder
from stagemesh.stages.worker.model_runner import ModelRunner

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
            unused = Decoder(config, layers, TensorShard(rank, tp)).load(checkpoint)
        assert checkpoint.bytes_read == 4 * expected
        assert unused == []


def test_a_tied_head_reads_the_embedding_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", max_model_len=128)).model
    with Checkpoint(folder, torch.float32) as checkpoint:
        Decoder(config, (0, 3), TensorShard()).load(checkpoint)
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


# -- memory ------------------------------------------------------------------------------------------------

MIB = 2**20
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 2}
VOCAB = 1024
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""safetensors' name of the type, and the shape, by name."""


def dense(out: int, width: int) -> Tensors:
    return {"weight": ("BF16", (out, width))}


def fp8_blocks(out: int, width: int) -> Tensors:
    return {"weight": ("F8_E4M3", (out, width)), "weight_scale_inv": ("F32", (out // 128, width // 128))}


def four_bit(qweight: tuple[int, int], out: int, width: int) -> Tensors:
    groups = width // 128
    return {"qweight": ("I32", qweight), "qzeros": ("I32", (groups, out // 8)), "scales": ("F16", (groups, out))}


def awq(out: int, width: int) -> Tensors:
    return four_bit((width, out // 8), out, width)


def gptq(out: int, width: int) -> Tensors:
    return four_bit((width // 8, out), out, width)


def tensors_of(num_layers: int, num_experts: int, linear: Any) -> Tensors:
    """What the checkpoint of a Llama of SIZES consists of, of a Mixtral if there are experts."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    matrices = {f"self_attn.{side}_proj": (hidden, hidden) for side in "qo"}
    matrices |= {f"self_attn.{side}_proj": (hidden // 8, hidden) for side in "kv"}
    gate, up, down = ("w1", "w3", "w2") if num_experts else ("gate_proj", "up_proj", "down_proj")
    for mlp in [f"block_sparse_moe.experts.{e}" for e in range(num_experts)] or ["mlp"]:
        matrices |= {f"{mlp}.{gate}": (inner, hidden), f"{mlp}.{up}": (inner, hidden), f"{mlp}.{down}": (hidden, inner)}
    tensors: Tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (VOCAB, hidden)))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    for layer in (f"model.layers.{i}" for i in range(num_layers)):
        tensors |= {f"{layer}.{norm}_layernorm.weight": ("BF16", (hidden,)) for norm in ("input", "post_attention")}
        if num_experts:
            tensors[f"{layer}.block_sparse_moe.gate.weight"] = ("BF16", (num_experts, hidden))
        for name, shape in matrices.items():
            tensors |= {f"{layer}.{name}.{suffix}": tensor for suffix, tensor in linear(*shape).items()}
    return tensors


def write_zeros(file: Path, tensors: Tensors) -> tuple[int, int]:
    """A safetensors file of zeros that takes no disk; bytes of all tensors and of the largest."""
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
    header, end, largest = {}, 0, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + sizes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        largest = max(largest, end - start)
    encoded = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        out.truncate(8 + len(encoded) + end)
    return end, largest


MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
FOUR_BIT = {"bits": 4, "group_size": 128}
CASES: dict[str, tuple[Tensors, dict[str, Any], dict[str, Any], float]] = {
    "dense": (tensors_of(2, 0, dense), {}, {}, 1.0),
    "mixture": (tensors_of(1, 3, dense), MIXTURE, {}, 1.0),
    "fp8 blocks": (tensors_of(1, 0, fp8_blocks), FP8, {}, 1.0),
    "awq": (tensors_of(1, 0, awq), {"quantization_config": FOUR_BIT | {"quant_method": "awq"}}, {}, 1.0),
    "gptq": (tensors_of(1, 0, gptq), {"quantization_config": FOUR_BIT | {"quant_method": "gptq"}}, {}, 1.0),
    "online int8": (tensors_of(1, 0, dense), {}, {"quantization": "int8"}, 0.5),
}
"""Tensors, what is special in config.json, in the engine's arguments, and the share of its bytes that a rank keeps."""


def test_loading_takes_the_memory_that_a_rank_keeps_and_that_of_one_tensor(tmp_path: Path) -> None:
    sizes, cases = [], []
    for name, (tensors, config, args, _) in CASES.items():
        (folder := tmp_path / name).mkdir()
        num_layers = sum(tensor.endswith(".input_layernorm.weight") for tensor in tensors)
        write_model_folder(folder, num_hidden_layers=num_layers, vocab_size=VOCAB, **SIZES, **config)
        sizes.append(write_zeros(folder / "model.safetensors", tensors))
        rank = {"model": str(folder), "device": "cpu", "tensor_parallel_size": 2, "max_model_len": 128}
        cases.append(json.dumps(rank | args))
    # malloc is to give back at once what is freed: what it may keep for later is not what loading needs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4)}
    script = Path(__file__).parents[2] / "support" / "loading_memory.py"
    done = subprocess.run([sys.executable, script, *cases], env=environment, stdout=subprocess.PIPE, check=True)
    for name, (whole, largest), (end, peak) in zip(CASES, sizes, json.loads(done.stdout), strict=True):
        shard = CASES[name][-1] * whole / 2
        slack = 6 * MIB + shard / 32  # scales become float32; some of the memory is not the tensors'
        assert 0.95 * shard < end < shard + slack, name
        assert peak < shard + largest + slack, name
