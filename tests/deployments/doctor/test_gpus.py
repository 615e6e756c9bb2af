from __future__ import annotations

import pytest

from stagemesh.deployments.doctor.gpus import find_gpus, parse_devices, parse_topology

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV12\tSYS\tPXB\t0-31\t0\t\tN/A\n"
    "GPU1\tNV12\t X \tSYS\tPXB\t0-31\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tNODE\t32-63\t1\t\tN/A\n"
    "NIC0\tPXB\tPXB\tNODE\t X \t\t\t\t\n\n"
    "Legend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n\nNIC Legend:\n\n  NIC0: mlx5_0\n"
)


def test_the_topology_is_read_as_a_matrix_of_gpus() -> None:
    assert parse_topology(TOPOLOGY) == (("X", "NV12", "SYS"), ("NV12", "X", "SYS"), ("SYS", "SYS", "X"))


def test_devices_are_read_with_their_memory_and_driver() -> None:
    text = "0, NVIDIA L40S, 46068, 580.65.06\n1, NVIDIA GB10, [N/A], 580.65.06\n"
    devices, driver = parse_devices(text)
    assert driver == "580.65.06"
    assert [(gpu.index, gpu.name, gpu.memory_bytes) for gpu in devices] == [
        (0, "NVIDIA L40S", 46068 * 2**20),
        (1, "NVIDIA GB10", 0),
    ]


def test_other_output_is_refused() -> None:
    with pytest.raises(ValueError):
        parse_devices("No devices were found")


@pytest.mark.gpu
def test_gpus_of_this_machine_can_be_used() -> None:
    gpus = find_gpus()
    if not gpus.devices:
        pytest.skip("no NVIDIA GPU")
    assert gpus.error == "" and gpus.is_usable and gpus.nccl and gpus.driver
