"""`layout: auto` on the nodes that Ray would list; Ray does not run here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.model_configs import CONFIGS

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.deployments import auto_layout
from stagemesh.deployments.auto_layout import cluster_of_nodes, with_layout


def node(gpus: int, kind: str = "", *, label: str = "", alive: bool = True) -> dict[str, Any]:
    resources: dict[str, float] = {"CPU": 8.0}
    if gpus:
        resources["GPU"] = float(gpus)
    if kind:
        resources[f"accelerator_type:{kind}"] = 1.0
    labels = {"ray.io/accelerator-type": label} if label else {}
    return {"Alive": alive, "Resources": resources, "Labels": labels, "NodeManagerHostname": "a"}


def names(nodes: list[dict[str, Any]]) -> list[list[str]] | None:
    cluster = cluster_of_nodes(nodes)
    return None if cluster is None else [[gpu.name for gpu in cards] for cards in cluster.nodes]


def test_cards_are_known_by_rays_labels() -> None:
    assert names([node(2, "H100")]) == [["H100-80GB"] * 2]
    assert names([node(1, label="L40S")]) == [["L40S-48GB"]]
    assert names([node(1, label="GeForce-RTX-4090")]) == [["RTX-4090-24GB"]]
    # Ray says A100 of both sizes; who adds the label of the larger gets it.
    assert names([node(1, "A100")]) == [["A100-40GB"]]
    assert names([node(1, "A100", label="A100-80G")]) == [["A100-80GB"]]


def test_dead_machines_and_those_without_gpus_do_not_count() -> None:
    assert names([node(0), node(1, "T4"), node(4, "T4", alive=False)]) == [["T4-16GB"]]
    assert names([node(0), node(4, "T4", alive=False)]) is None


def test_unknown_cards_leave_the_sizes_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        assert names([node(1, "T4"), node(1, "Strange-9000")]) is None
    assert "unknown GPUs" in caplog.text


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-70b"]))
    return str(tmp_path)


def laid_out(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], **settings: Any) -> EngineArgs:
    monkeypatch.setattr(auto_layout, "pick_device", lambda args: "cuda" if args.device == "auto" else args.device)
    monkeypatch.setattr(auto_layout.ray, "nodes", lambda: nodes)
    return with_layout(EngineArgs(layout="auto", **settings))


def test_the_sizes_are_those_of_the_plan(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(4, "H100"), node(4, "H100")]
    args = laid_out(monkeypatch, nodes, model=model, max_model_len=4096, seed=3)
    assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size) == (4, 1, 2)
    assert args.layout is None and args.seed == 3 and args.max_model_len == 4096
    scaled = laid_out(monkeypatch, nodes, model=model, autoscaling_config={"max_replicas": 2})
    assert scaled.tensor_parallel_size == 4 and "data_parallel_size" not in scaled.model_fields_set


def test_without_gpus_nothing_is_cut(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes, device in (([node(0)], "auto"), ([node(8, "H100")], "cpu")):
        args = laid_out(monkeypatch, nodes, model=model, device=device)
        assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size) == (1, 1, 1)


def test_a_model_that_does_not_fit_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        laid_out(monkeypatch, [node(1, "T4")], model=model)


def test_a_layout_and_a_size_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(model="config/models/demo", layout="auto", tensor_parallel_size=2, device="cpu")
    with pytest.raises(ConfigError, match="layout='auto': chooses tensor_parallel_size"):
        EngineConfig.resolve(with_layout(args))
