from __future__ import annotations

from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.planner.hardware import GB, Gpu, make_cluster


def test_cards_are_dealt_to_machines_in_order() -> None:
    cluster = make_cluster("4xA100-80GB,4xL40S-48GB", nodes=2)
    assert [[gpu.name for gpu in node] for node in cluster.nodes] == [["A100-80GB"] * 4, ["L40S-48GB"] * 4]
    assert cluster.intra.name == "pcie4"  # the slower of both
    assert [(node, gpu.name) for node, gpu in cluster.slots(3)] == [(0, "A100-80GB"), (1, "L40S-48GB")]
    assert make_cluster("8xL40S", gpus_per_node=4).nodes == make_cluster("8xL40S-48GB", nodes=2).nodes


def test_cards_and_links_can_be_added() -> None:
    cluster = make_cluster(
        "2xBIG",
        gpu_specs=["BIG=mem:192,bw:5300,flops:1300,fp8:2600,link:wide"],
        links=["wide=128", "slow=0.5"],
        inter="slow",
    )
    assert cluster.nodes[0][0] == Gpu(
        name="BIG", memory_bytes=192 * GB, bandwidth=5300e9, flops={"bf16": 1300e12, "fp8": 2600e12}, link="wide"
    )
    assert (cluster.intra.rate, cluster.inter.rate) == (128e9, 0.5e9)


def test_more_than_four_cards_share_the_lanes_of_pcie() -> None:
    assert make_cluster("4xL40S", intra="pcie5").intra.rate == 64e9
    assert make_cluster("8xL40S", intra="pcie5").intra.rate == 32e9
    assert make_cluster("8xL40S", intra="pcie5", nodes=2).intra.rate == 64e9


@pytest.mark.parametrize(
    ("gpus", "settings", "message"),
    [
        ("L40S", {}, "gpus='L40S': must be COUNTxNAME"),
        ("0xL40S", {}, "gpus='0xL40S': must be COUNTxNAME"),
        ("4xA100", {}, "gpus='A100': comes in several sizes: A100-40GB, A100-80GB"),
        ("4xL40-48GB", {}, "is not in the table; did you mean 'L40S-48GB'?"),
        ("6xL40S", {"nodes": 4}, "nodes=4: 4 machines of 1 are not the 6 GPUs"),
        ("6xL40S", {"gpus_per_node": 4}, "gpus_per_node=4: 2 machines of 4 are not the 6 GPUs"),
        ("6xL40S", {"intra": "nvlnk4"}, "intra='nvlnk4': is not in the table; did you mean 'nvlink4'?"),
        ("6xL40S", {"gpu_specs": ["X=mem:1"]}, "gpu_spec='X=mem:1': must be NAME=mem:GB,bw:GB/s"),
        ("6xL40S", {"gpu_specs": ["X=mem:1,bw:0,flops:1"]}, "must be NAME=mem:GB,bw:GB/s"),
        ("6xL40S", {"links": ["x=fast"]}, "link='x=fast': must be NAME=GB/s"),
    ],
)
def test_a_mistake_names_what_is_allowed(gpus: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_cluster(gpus, **settings)
    assert message in str(error.value)
