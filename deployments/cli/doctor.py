"""`stagemesh doctor`: what on these machines would keep a model from being served. Imports torch and Ray on demand."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import local_folder
from stagemesh.deployments.doctor.diagnosis import diagnose
from stagemesh.deployments.doctor.facts import Facts, Node
from stagemesh.deployments.doctor.gather import Places, gather


def doctor(
    address: Annotated[
        str | None, typer.Option(help="A live Ray cluster, e.g. auto; without it this machine alone is checked.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id: is it the same and whole on every node?")] = None,
    links: Annotated[
        bool, typer.Option("--links", help="Measure each link over the transport of a lane; takes up to minutes.")
    ] = False,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks of a stage; by default all GPUs of a node."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of HTTP.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC.", min=1, max=65535)] = 9000,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts and findings as JSON.")] = False,
) -> None:
    """Check this machine, or a live cluster, for what keeps models from being served. Exit status 1: an error."""
    model = str(local_folder(model) or model) if model else None
    places = Places(model=model, http_port=port, grpc_port=grpc_port)
    facts = msgspec.structs.replace(
        _cluster(address, places, links) if address else _machine(places, links),
        tensor_parallel_size=tensor_parallel_size,
        model=model,
    )
    findings = diagnose(facts)
    from stagemesh.deployments.doctor import report

    if as_json:
        print(report.as_json(facts, findings))
    else:
        from rich.console import Console

        report.show(facts, findings, Console(highlight=False))
    sys.stdout.flush()
    raise typer.Exit(report.exit_status(findings))


def _machine(places: Places, links: bool) -> Facts:
    node = gather(places)
    if not links:
        return Facts(nodes=(node,))
    from stagemesh.deployments.doctor.local_links import measure_here, places_of

    try:
        return Facts(nodes=(node,), links=tuple(measure_here(places_of(node))))
    except (RuntimeError, OSError) as error:
        return Facts(nodes=(node,), links_error=str(error))


def _cluster(address: str, places: Places, links: bool) -> Facts:
    from stagemesh.deployments.doctor import cluster

    try:
        cluster.connect(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError("address", address, f"no Ray cluster to check: {error}") from None
    nodes, unreachable = cluster.gather_cluster(places)
    facts = Facts(nodes=tuple(nodes), is_cluster=True, unreachable=unreachable)
    return _with_links(facts, nodes) if links and nodes else facts


def _with_links(facts: Facts, nodes: list[Node]) -> Facts:
    import ray

    from stagemesh.deployments.doctor.cluster import measure_cluster

    try:
        return msgspec.structs.replace(facts, links=tuple(measure_cluster(nodes)))
    except (TimeoutError, ray.exceptions.RayError) as error:
        return msgspec.structs.replace(facts, links_error=str(error).strip().splitlines()[-1])
