"""One cluster for all chaos tests, and a report at the end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.chaos.cluster import ChaosCluster, chaos_cluster
from tests.chaos.load import open_clients
from tests.chaos.report import REPORT, Report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.chaos.load import Clients

STREAMS = int(os.environ.get("CHAOS_STREAMS", "200"))
KILLS = int(os.environ.get("CHAOS_KILLS", "30"))  # of each tier
LONGEST_S = float(os.environ.get("CHAOS_SECONDS", "3000"))  # of a kill loop


@pytest.fixture(scope="session")
async def cluster() -> AsyncIterator[ChaosCluster]:
    """A head and two nodes."""
    async with chaos_cluster(nodes=2) as made:
        yield made


@pytest.fixture
async def clients(cluster: ChaosCluster) -> AsyncIterator[Clients]:
    async with open_clients(cluster.url) as made:
        yield made


@pytest.fixture(scope="session")
def report() -> Report:
    return REPORT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    if REPORT.rows:
        terminalreporter.section("chaos")
        terminalreporter.write_line(REPORT.publish())
