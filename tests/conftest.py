"""One Ray instance per test session, started by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.harness import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray instance of their own come first: later ones would find the session's."""
    items.sort(key=lambda item: item.get_closest_marker("own_ray") is None)
