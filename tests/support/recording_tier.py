"""A tier that answers at once and records what it received."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cascade.benchmark.microbench import DESCRIPTION, InstantTier

if TYPE_CHECKING:
    from cascade.protocol.codec import ClientMessage
    from cascade.protocol.server import Connection
    from cascade.protocol.services import Description


class RecordingTier(InstantTier):
    """Answers as `InstantTier` does; `received` and `ended` tell a test what happened."""

    def __init__(self, description: Description = DESCRIPTION) -> None:
        super().__init__(description)
        self.received: asyncio.Queue[tuple[Connection, ClientMessage]] = asyncio.Queue()
        self.ended: asyncio.Queue[Connection] = asyncio.Queue()

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        self.received.put_nowait((connection, message))
        super().receive(connection, message)

    def disconnected(self, connection: Connection) -> None:
        self.ended.put_nowait(connection)
