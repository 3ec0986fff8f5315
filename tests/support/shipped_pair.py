"""Fixtures of the shipped pair: in this process, and over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.evaluation.client import InProcessClient, start_in_process
from cascade.local import LocalServer, local_server
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ENGINE = {"threads": 1}
SETTINGS = Application.model_validate({"drafter": {"engine": ENGINE}, "expert": {"engine": ENGINE}})


@pytest.fixture(scope="session")
async def shipped() -> AsyncIterator[InProcessClient]:
    """A client of the shipped pair in this process."""
    async with start_in_process(SETTINGS) as client:
        yield client


@pytest.fixture(scope="session")
async def shipped_server() -> AsyncIterator[LocalServer]:
    """Both tiers and the router of the shipped pair in this process."""
    async with local_server(SETTINGS) as running:
        yield running


@pytest.fixture(scope="session")
async def shipped_url(shipped: InProcessClient) -> AsyncIterator[str]:
    """The URL of the same pair over HTTP."""
    async with serve_http(create_app(shipped.service)) as url:
        yield url
