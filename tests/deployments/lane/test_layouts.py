"""The same greedy and seeded text from every layout and every transport, through HTTP."""

from __future__ import annotations

import pytest
from support.harness import Cluster, greedy_and_seeded, mixed_prompts

NUM_PROMPTS = 50
LAYOUTS = [
    # tp, pp, partition, transports that differ there
    (1, 1, None, ["gloo"]),
    (2, 1, None, ["gloo"]),
    (4, 1, None, ["gloo"]),
    (1, 2, None, ["gloo", "object_store"]),
    (1, 3, "2,5,1", ["gloo", "object_store"]),
    (2, 2, None, ["object_store", "gloo"]),  # last, as the files that follow serve with it too
]
CASES = [(tp, pp, split, name) for tp, pp, split, names in LAYOUTS for name in names]


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> list[str]:
    """What one rank alone says."""
    cluster.deploy(tensor_parallel_size=1, pipeline_parallel_size=1)
    return greedy_and_seeded(cluster, mixed_prompts(NUM_PROMPTS))


@pytest.mark.parametrize(("tp", "pp", "split", "transport"), CASES[1:])
def test_every_layout_and_transport_gives_the_same_text(
    cluster: Cluster, reference: list[str], tp: int, pp: int, split: str | None, transport: str
) -> None:
    cluster.deploy(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        pipeline_layer_partition=split,
        activation_transport=transport,
    )
    assert len(reference) == NUM_PROMPTS * 6 // 5
    assert greedy_and_seeded(cluster, mixed_prompts(NUM_PROMPTS)) == reference
