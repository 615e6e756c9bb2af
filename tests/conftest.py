"""One Ray instance per test session, and the order of the tests: what starts Ray beside what does not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.harness import Cluster, running_cluster

# Ray's own 15 starves its processes beside tests that compute.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray reads it in this spelling

SAME_APPLICATION = ["test_layouts", "test_serving", "test_failures"]
"""Files of which each begins with the application that the one before ends with, so that it need not start again."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With Ray first, as one group for pytest-xdist: it is the longest, and most of it is waiting.

    Of these, tests with a Ray instance of their own come first: later ones would find the session's. Of the others
    each file is a group, because its tests share what its fixtures made.
    """
    items.sort(key=_place)
    for item in items:
        group = "ray" if _place(item) < WITHOUT_RAY else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


WITHOUT_RAY = (2, 0)


def _place(item: pytest.Item) -> tuple[int, int]:
    if item.get_closest_marker("own_ray") is not None:
        return (0, 0)
    if "cluster" not in getattr(item, "fixturenames", ()):
        return WITHOUT_RAY
    name = item.path.stem
    return (1, SAME_APPLICATION.index(name) if name in SAME_APPLICATION else len(SAME_APPLICATION))
