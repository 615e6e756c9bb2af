"""The mixture of experts that comes with the repository, served as config/demo-moe.yaml says and in other layouts."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support.harness import REPO, Cluster, chat, greedy_and_seeded, mixed_prompts, num_right

NUM_PROMPTS = 50
EXPERTS, EXPERTS_PER_TOKEN, LAYERS = 8, 2, 8


@pytest.fixture(scope="module")
def args() -> dict[str, Any]:
    """Of config/demo-moe.yaml, with an absolute path and one lane."""
    file = yaml.safe_load((REPO / "config" / "demo-moe.yaml").read_text())
    args: dict[str, Any] = dict(file["applications"][0]["args"])
    args.pop("autoscaling_config", None)
    return {**args, "model": str(REPO / args["model"]), "served_model_name": "demo"}


@pytest.fixture(scope="module")
def reference(cluster: Cluster, args: dict[str, Any]) -> list[str]:
    """What one rank alone says."""
    cluster.deploy(**{**args, "tensor_parallel_size": 1, "enable_expert_parallel": False})
    return greedy_and_seeded(cluster, mixed_prompts(NUM_PROMPTS))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "enable_expert_parallel": False},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "enable_expert_parallel": True},
    ],
    ids=["tensor parallel", "experts over 2, 2 stages", "experts over 2"],
)
def test_every_layout_gives_the_same_text(
    cluster: Cluster, args: dict[str, Any], reference: list[str], layout: dict[str, Any]
) -> None:
    cluster.deploy(**{**args, **layout})
    assert len(reference) == NUM_PROMPTS * 6 // 5
    assert greedy_and_seeded(cluster, mixed_prompts(NUM_PROMPTS)) == reference


@pytest.mark.parametrize("skill", ["add", "lookup"])
def test_the_mixture_answers_held_out_questions(cluster: Cluster, args: dict[str, Any], skill: str) -> None:
    assert args["enable_expert_parallel"] and args["tensor_parallel_size"] == 2
    cluster.deploy(**args)
    assert num_right(cluster, skill, 100) >= 95


def test_every_token_is_counted_at_its_experts(cluster: Cluster, args: dict[str, Any]) -> None:
    cluster.deploy(**args)
    before = cluster.settled_metrics()
    with cluster.client() as client:
        # Answers that end by themselves may have one more token computed, planned before their end was known.
        assert chat(client, "What is 17+25?", max_tokens=2) == "42"
    after = cluster.settled_metrics()
    name = "stagemesh:expert_tokens_total"
    computed = after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"]
    computed += after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] - 1
    assert after[name] - before[name] == computed * EXPERTS_PER_TOKEN * LAYERS
