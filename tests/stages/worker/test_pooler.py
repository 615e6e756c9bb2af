"""Embeddings: against transformers' hidden states, however the prompt is cut, cached or spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from support.model_harness import Part, ThreadLane, make_checkpoint, make_plan

from stagemesh import LLM, PoolingParams
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.scheduler import Scheduler
from stagemesh.stages.messages.step import PoolSpec, StepPlan
from stagemesh.stages.worker.pooler import Pooler

PROMPTS = [list(range(3, 3 + n)) for n in (1, 5, 16, 40)]
Vector = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def reference(folder: Path, token_ids: list[int], pooling: str) -> Vector:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([token_ids])).last_hidden_state[0]
    vector: Vector = (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()
    return vector


class Lane:
    """A scheduler over runners in threads: what an engine does, one step after another."""

    def __init__(self, folder: Path, *, budget: int = 2048, **cut: Any) -> None:
        self.ranks = ThreadLane(folder, **cut)
        self.scheduler = Scheduler(
            num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=64
        )

    def embed(self, prompts: list[list[int]], params: PoolingParams) -> list[Vector]:
        asked = SamplingParams(max_tokens=1, seed=0, pooling=params)
        for i, prompt in enumerate(prompts):
            self.scheduler.add_request(str(i), prompt, asked)
        found = {}
        while (step := self.scheduler.schedule()) is not None:
            result = self.ranks.run(step.to_plan(1, 0))
            for update in self.scheduler.process_result(step, result):
                assert update.token_ids == [] and update.finish_reason == "stop"
                found[int(update.request_id)] = np.frombuffer(update.embedding, np.float32)
        assert not self.scheduler.has_work
        return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    ("budget", "cut"),
    [(2048, {}), (7, {}), (2048, {"tp": 2}), (2048, {"partition": (1, 2)}), (16, {"tp": 2, "partition": (2, 1)})],
)
def test_a_vector_is_that_of_transformers_in_every_cut(folder: Path, pooling: Any, budget: int, cut: Any) -> None:
    lane = Lane(folder, budget=budget, **cut)
    params = PoolingParams(pooling=pooling, normalize=False)
    for vector, prompt in zip(lane.embed(PROMPTS, params), PROMPTS, strict=True):
        np.testing.assert_allclose(vector, reference(folder, prompt, pooling), atol=1e-4)


def test_vectors_have_length_one_and_the_dimensions_asked_for(folder: Path) -> None:
    lane = Lane(folder)
    [whole] = lane.embed([PROMPTS[2]], PoolingParams(normalize=False))
    [unit] = lane.embed([PROMPTS[2]], PoolingParams())
    [short] = lane.embed([PROMPTS[2]], PoolingParams(dimensions=8))
    np.testing.assert_allclose(unit, whole / np.linalg.norm(whole), atol=1e-5)
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_cached_prefix_changes_no_vector(folder: Path, pooling: Any) -> None:
    lane = Lane(folder)
    params = PoolingParams(pooling=pooling)
    first, second = (lane.embed([PROMPTS[3]], params)[0] for _ in range(2))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert (lane.scheduler.stats().prefix_hits > 0) == (pooling == "last"), (
        "a mean needs the hidden state of every token"
    )


def test_a_prompt_may_fill_the_whole_model(folder: Path) -> None:
    assert Lane(folder).embed([list(range(64))], PoolingParams())[0].shape == (64,)


def test_a_prompt_that_begins_again_is_counted_from_nothing() -> None:
    pooler, ones = Pooler(), torch.ones(4, 2)

    def step(context_len: int, *, is_whole: bool) -> StepPlan:
        plan = make_plan(Part([1, 2, 3, 4], context_len, [0, 1]))
        plan.pools = [PoolSpec(0, "mean", False, 0, is_whole)]
        return plan

    assert pooler.pool(step(0, is_whole=False), 100 * ones, lambda x: x) == []
    assert pooler.pool(step(0, is_whole=False), ones, lambda x: x) == []
    [vector] = pooler.pool(step(4, is_whole=True), 3 * ones, lambda x: x)
    assert np.frombuffer(vector, np.float32).tolist() == [2.0, 2.0]
    assert not pooler._sums


def test_a_vector_that_is_not_finite_is_left_empty() -> None:
    hidden = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    plan = make_plan(Part([1], 0, [0]), Part([2], 0, [1]))
    plan.pools = [PoolSpec(i, "last", False, 0, True) for i in range(2)]
    good, bad = Pooler().pool(plan, hidden, lambda x: x)
    assert np.frombuffer(good, np.float32).tolist() == [1.0, 2.0] and bad == b""


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="pooling='max': must be one of last, mean"):
        PoolingParams(pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dimensions=0"):
        PoolingParams(dimensions=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("config/models/demo", dtype="float32", device="cpu", max_model_len=128) as llm:
        yield llm


def test_the_offline_classes_embed_beside_generating(llm: LLM) -> None:
    texts = ["What is 17+25?", "Hello", "What is 17+25?"]
    embedded = llm.embed(texts, use_tqdm=False)
    vectors = np.array([output.outputs.embedding for output in embedded])
    assert vectors.shape == (3, embedded[0].outputs.hidden_size) == (3, 256)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert vectors[0] @ vectors[1] < 0.999
    encoded = llm.encode(texts[:1], PoolingParams(pooling="mean", normalize=False), use_tqdm=False)
    assert encoded[0].outputs.data.shape == (256,)
    assert llm.generate("Hello", SamplingParams(max_tokens=3), use_tqdm=False)[0].finished
