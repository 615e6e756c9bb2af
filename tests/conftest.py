"""One Ray instance per test session, started by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running
