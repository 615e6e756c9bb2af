"""A family is one file and one line: a toy is written, registered, served and compared with plain torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.matrix import FAMILIES as TESTED
from support.model_folder import write_model_folder
from support.model_harness import Part, ThreadLane, assert_same_logits, some_token_ids
from torch import Tensor

from stagemesh import LLM, SamplingParams
from stagemesh.config.errors import ConfigError
from stagemesh.config.families import FAMILIES
from stagemesh.config.model import ModelConfig

TOY_FILE = '''
"""A layer that norms what attention and MLP give, not what they get; the MLP is down(relu(up(x))²), scaled."""

from typing import Literal

from pydantic import Field

from stagemesh.config.model import Family


class Toy(Family):
    hidden_act: Literal["relu2"]
    mlp_scale: float = Field(gt=0)

    def decoder_layer(self, model, index):
        from stagemesh.stages.layers.attention import Attention
        from stagemesh.stages.layers.linear import ColumnParallelLinear, OutputShard, RowParallelLinear, shard_slice
        from stagemesh.stages.layers.norm import RMSNorm

        config, tp, method, name = model.config, model.tp, model.make_method, f"model.layers.{index}"
        scale, width, inner = self.mlp_scale, config.hidden_size, config.intermediate_size

        class ReluMLP:
            def __init__(self):
                outputs = [OutputShard(f"{name}.mlp.up_proj", inner, [shard_slice(inner, tp)])]
                self.up = ColumnParallelLinear(width, outputs, bias=False, make_method=method)
                down = f"{name}.mlp.down_proj"
                self.down = RowParallelLinear(down, inner, width, bias=False, tp=tp, make_method=method)

            def load(self, checkpoint):
                self.up.load(checkpoint)
                self.down.load(checkpoint)

            def __call__(self, x):
                return self.down(self.up(x).relu().square()) * scale

        class PostNormLayer:
            def __init__(self):
                self.attention = Attention(f"{name}.self_attn", config, tp, make_method=method)
                self.attention_norm = RMSNorm(f"{name}.attention_norm", width, config.rms_norm_eps)
                self.feed_forward = ReluMLP()
                self.mlp_norm = RMSNorm(f"{name}.mlp_norm", width, config.rms_norm_eps)

            def load(self, checkpoint):
                for part in (self.attention, self.attention_norm, self.feed_forward, self.mlp_norm):
                    part.load(checkpoint)

            def __call__(self, residual, hidden_states, batch, cache):
                x = residual if hidden_states is None else residual + hidden_states
                x = x + self.attention_norm(self.attention(x, batch, cache))
                return x, self.mlp_norm(self.feed_forward(x))

        return PostNormLayer()
'''
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB, EPS = 64, 96, 8, 2, 3, 2048, 1e-5
TOKENIZER = Path(__file__).parents[3] / "config/models/demo"
KEYS: dict[str, Any] = {
    "architectures": ["ToyForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "hidden_act": "relu2",
    "mlp_scale": 0.5,
    "eos_token_id": None,
}


@pytest.fixture(scope="module", autouse=True)
def toy_family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one file, and the one line."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "toy_family.py").write_text(TOY_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(FAMILIES, "ToyForCausalLM", "toy_family:Toy")
        yield
    sys.modules.pop("toy_family", None)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of random weights."""
    generator = torch.Generator().manual_seed(5)
    head_dim = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "attention_norm": (HIDDEN,),
        "mlp_norm": (HIDDEN,),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[f"{name}.weight"] = 1 + 0.3 * noise if len(shape) == 1 else 0.15 * noise
    folder = write_model_folder(tmp_path_factory.mktemp("toy"), **KEYS)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """[T, vocab] of the whole sequence at once, as the formulas say it."""
    weights = load_file(folder / "model.safetensors")
    count, dim = len(token_ids), HIDDEN // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weights[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        """Rotary positions, [heads, T, dim]: the pair of features i and i + dim / 2."""
        angles = torch.outer(torch.arange(count), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = ((x @ weights[f"{name}.{side}_proj.weight"].T).view(count, -1, dim).transpose(0, 1) for side in "qkv")
        k, v = (side.repeat_interleave(HEADS // KV_HEADS, 0) for side in (turn(k), v))
        scores = turn(q) @ k.transpose(1, 2) / dim**0.5
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weights[f"{name}.o_proj.weight"].T

    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        x = x + norm(attention(x, f"{layer}.self_attn"), f"{layer}.attention_norm")
        inner = (x @ weights[f"{layer}.mlp.up_proj.weight"].T).relu().square()
        x = x + norm(0.5 * inner @ weights[f"{layer}.mlp.down_proj.weight"].T, f"{layer}.mlp_norm")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("tp, partition", [(1, None), (2, None), (2, (2, 1))])
def test_the_logits_of_the_toy_are_those_of_its_formulas(toy: Path, tp: int, partition: tuple[int, ...] | None) -> None:
    lane = ThreadLane(toy, tp=tp, partition=partition)
    ids, table = some_token_ids(37, seed=1), list(range(10))
    expected = reference_logits(toy, ids)

    assert_same_logits(lane.logits(Part(ids[:20], 0, table)), expected[:20])
    assert_same_logits(lane.logits(Part(ids[20:36], 20, table)), expected[20:36])
    assert_same_logits(lane.logits(Part(ids[36:], 36, table)), expected[36:])


def test_the_toy_is_served(toy: Path) -> None:
    prompts = [some_token_ids(count, seed=count) for count in (5, 23)]
    with LLM(str(toy), tokenizer=str(TOKENIZER), device="cpu", max_model_len=128) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
        )
    for ids, answer in zip(prompts, answers, strict=True):
        expected = list(ids)
        for _ in range(8):
            expected.append(int(reference_logits(toy, expected)[-1].argmax()))
        assert list(answer.outputs[0].token_ids) == expected[len(ids) :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_scale": None}, r"mlp_scale=None: must be a number, above 0 \(in .*config.json\)"),
        ({"mlp_scale": 0.0}, r"mlp_scale=0\.0: must be a number, above 0"),
        ({"hidden_act": "silu"}, "hidden_act='silu': must be one of relu2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=8"),
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, .*, ToyForCausalLM"),
    ],
)
def test_the_toy_is_refused_as_every_family_is(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_folder(write_model_folder(tmp_path, **KEYS | changes))


def test_a_toy_tensor_that_is_missing_or_unknown_is_named(
    toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(toy / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((toy / "config.json").read_text())))
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(INNER, HIDDEN)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ThreadLane(tmp_path)
    assert "1 tensors of the checkpoint are not used: model.layers.0.mlp.gate_proj.weight" in caplog.text

    del tensors["model.layers.2.mlp_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.2\.mlp_norm\.weight'"):
        ThreadLane(tmp_path)


def test_a_config_of_every_family_is_read_sent_and_taken_without_torch(tmp_path: Path) -> None:
    """By processes without tensors: the command line and the leader read it, routers get it pickled."""
    folders = []
    for cls, keys in TESTED.values():
        folders.append(tmp_path / cls)
        folders[-1].mkdir()
        write_model_folder(folders[-1], architectures=[f"{cls}ForCausalLM"], **keys)
    program = (
        "import pickle, sys\n"
        "from stagemesh.config.model import ModelConfig\n"
        "for folder in sys.argv[1:]:\n"
        "    config = ModelConfig.from_folder(folder)\n"
        "    assert pickle.loads(pickle.dumps(config)) == config\n"
        "    assert 'torch' not in sys.modules, config.architecture\n"
        "sys.stdout.buffer.write(pickle.dumps(config))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(done.stdout) == ModelConfig.from_folder(folders[-1])
