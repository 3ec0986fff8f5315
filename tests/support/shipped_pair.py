"""The pair that ships, in process and behind a real HTTP door."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
import uvicorn

from cascade.api.http import create_app
from cascade.evaluation.client import InProcess, in_process
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ENGINE = {"threads": 1}
SETTINGS = Application.model_validate({"drafter": {"engine": ENGINE}, "expert": {"engine": ENGINE}})


@pytest.fixture(scope="session")
async def shipped() -> AsyncIterator[InProcess]:
    """The pair that ships, answering in this process."""
    async with in_process(SETTINGS) as answerer:
        yield answerer


@pytest.fixture(scope="session")
async def door(shipped: InProcess) -> AsyncIterator[str]:
    """The address of the same pair over HTTP."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(create_app(shipped.service), lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving
