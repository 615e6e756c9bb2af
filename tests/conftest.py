"""One Ray instance per test session, and the order of the tests: what starts Ray beside what does not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.harness import Cluster, running_cluster

# Ray's own 15 starves its processes beside tests that compute.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray reads it in this spelling

SAME_APPLICATION = ["test_layouts", "test_serving", "test_failures", "test_chaos"]
"""Files of which each begins with the application that the one before ends with, so that it need not start again."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.hookimpl(wrapper=True)  # around pytest's own choice of tests by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Marks the tests that start Ray, and puts them first.

    Of these, tests with a Ray instance of their own come first: later ones would find the session's.
    """
    items.sort(key=_place)
    for item in items:
        if _place(item) < WITHOUT_RAY:
            item.add_marker(pytest.mark.ray)
    yield


WITHOUT_RAY = (2, 0)


def _place(item: pytest.Item) -> tuple[int, int]:
    if item.get_closest_marker("own_ray") is not None:
        return (0, 0)
    if "cluster" not in getattr(item, "fixturenames", ()):
        return WITHOUT_RAY
    name = item.path.stem
    return (1, SAME_APPLICATION.index(name) if name in SAME_APPLICATION else len(SAME_APPLICATION))
