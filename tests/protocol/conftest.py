"""Servers on loopback, and relays in front of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from tests.support import message_strategies
from tests.support.tcp_relay import TcpRelay

from cascade.protocol.server import TierServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.recording_tier import RecordingTier

    from cascade.protocol.services import TierKind

# A shared machine can stall; what matters is that the examples pass.
settings.register_profile("protocol", deadline=None, max_examples=50)
settings.load_profile("protocol")
message_strategies.register()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[RecordingTier, TierKind], Awaitable[str]]]:
    """Serve a tier on loopback and return its address."""
    servers: list[TierServer] = []

    async def start(tier: RecordingTier, kind: TierKind) -> str:
        servers.append(TierServer(tier, kind))
        return await servers[-1].start("127.0.0.1:0")

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
async def relay() -> AsyncIterator[Callable[[str], Awaitable[TcpRelay]]]:
    """Put a relay in front of an address."""
    relays: list[TcpRelay] = []

    async def start(address: str) -> TcpRelay:
        host, _, port = address.rpartition(":")
        relays.append(TcpRelay(host, int(port)))
        await relays[-1].open()
        return relays[-1]

    yield start
    for one in relays:
        await one.close()
