"""A router's view of the lanes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stagemesh.deployments.ingress import lane_view
from stagemesh.deployments.ingress.lane_view import LaneView
from stagemesh.stages.messages.request import EngineRequest


@pytest.fixture
def view() -> Iterator[LaneView]:
    view = LaneView()
    yield view
    view._context.term()


def test_a_choice_is_explained_until_its_request_is_over(view: LaneView) -> None:
    assert view.choose(call("early")) == [], "no lane is known yet"
    view.set_lanes({"lane-a": "tcp://127.0.0.1:1", "lane-b": "tcp://127.0.0.1:2"})
    lanes = view.choose(call("r"))
    assert sorted(lanes) == ["lane-a", "lane-b"]
    choice = view.explain("r")
    assert choice is not None and choice.lane == lanes[0]
    view.finished("r")
    view.finished("r")
    assert view.explain("r") is None


def test_choices_that_nobody_takes_back_are_bounded(view: LaneView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_view, "MAX_OPEN_REQUESTS", 3)
    view.set_lanes({"lane": "tcp://127.0.0.1:1"})
    for i in range(5):
        view.choose(call(str(i)))
    assert [view.explain(str(i)) is not None for i in range(5)] == [False, False, True, True, True]


def call(request_id: str) -> EngineRequest:
    return EngineRequest(request_id, [1, 2, 3], b"", "")
