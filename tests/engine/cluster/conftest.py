"""A Slurm cluster that the tests of one file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.slurm import Cluster, running_cluster


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster, with two virtual nodes on this machine."""
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster
