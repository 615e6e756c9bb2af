"""Facts of good machines, to which a test does one bad thing."""

from __future__ import annotations

from typing import Any

import msgspec

from stagemesh.deployments.doctor.facts import Disk, Gpu, Gpus, Memory, Model, Node, Port, Transport

GIB = 2**30


def good_node(number: int = 1, num_gpus: int = 2, **changes: Any) -> Node:
    address = f"10.0.0.{number}"
    everything = range(num_gpus)
    node = Node(
        name=address,
        address=address,
        versions={"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "triton": "3.7.1", "code": "eb8ad1d804ed"},
        gpus=Gpus(
            devices=tuple(Gpu(index=i, name="NVIDIA L40S", memory_bytes=46068 * 2**20) for i in everything),
            driver="580.65.06",
            links=tuple(tuple("X" if i == j else "NV4" for j in everything) for i in everything),
            peers=tuple((True,) * num_gpus for _ in everything),
            nccl="2.29.3",
            is_usable=num_gpus > 0,
        ),
        transports=tuple(
            Transport(name=name, interface="eth0", address=address, why="test") for name in ("zeromq", "gloo", "nccl")
        ),
        shm=Disk(path="/dev/shm", purpose="shared memory", total_bytes=64 * GIB, free_bytes=63 * GIB),
        disks=(Disk(path="/tmp/ray", purpose="Ray's temporary files", total_bytes=500 * GIB, free_bytes=300 * GIB),),
        ports=(Port(number=8000, purpose="HTTP"), Port(number=9000, purpose="gRPC")),
        processes=(),
        memory=Memory(total_bytes=128 * GIB, available_bytes=100 * GIB),
        num_cpus=16,
        max_open_files=(65536, 1048576),
        haproxy="/usr/sbin/haproxy",
        has_token_auth=True,
        model=Model(folder="/models/m", size_bytes=15 * GIB, digest="1ee9b995c23a"),
    )
    return msgspec.structs.replace(node, **changes)
