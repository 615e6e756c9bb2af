"""The script that trains the demo models: the same twice, and what it saves is what others read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.harness import DEMO, REPO
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from stagemesh import LLM, SamplingParams

TEXT = "The king is in the garden, and the crown lies on the table.\n" * 400


@pytest.fixture(scope="module")
def train() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "tests" / "training"))
        return importlib.import_module("train")


@pytest.fixture(scope="module")
def trained(train: ModuleType) -> Callable[..., torch.nn.Module]:
    """One step of training from a seed."""

    def run(seed: int, moe: bool = False) -> torch.nn.Module:
        torch.manual_seed(seed)
        model: torch.nn.Module = train.LanguageModel(train.moe_config() if moe else train.Config())
        data = train.Data(Tokenizer.from_file(str(DEMO / "tokenizer.json")), TEXT, seed)
        train.train(model, data, steps=1, compiled=False)
        return model

    return run


def test_a_run_depends_on_its_seed_alone(trained: Callable[..., torch.nn.Module]) -> None:
    first, second, other = (trained(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
def test_what_is_saved_computes_what_was_trained(
    train: ModuleType, trained: Callable[..., torch.nn.Module], tmp_path: Path, moe: bool
) -> None:
    model = trained(1, moe)
    train.save(tmp_path, model, Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    prompt = torch.randint(0, 2048, (1, 40), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rounded = train.rounded(model)
    with torch.no_grad():
        hidden, _ = rounded.model(prompt)
        assert (rounded.logits(hidden) - reference(prompt).logits).abs().max() < 1e-4
    with LLM(str(tmp_path), dtype="float32", device="cpu", max_model_len=64) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        (answer,) = llm.generate([prompt[0].tolist()], params, use_tqdm=False)
    wanted = reference.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert list(answer.outputs[0].token_ids) == wanted[0, 40:].tolist()
