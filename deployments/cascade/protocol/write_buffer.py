"""The frames that wait to be written to a stream, joined per event loop iteration."""

from __future__ import annotations

import asyncio
from collections import deque

from cascade.errors import InvalidRequest, Overloaded
from cascade.protocol.services import FRAME_LIMIT_BYTES, FRAME_LIMIT_MESSAGES

# How much memory a peer that has stopped reading may use.
BACKLOG_LIMIT_BYTES = 4 * FRAME_LIMIT_BYTES


class WriteBuffer:
    """Frames of one message each, on their way to a single writer; lives on one event loop."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, frame: bytes) -> None:
        """Add a frame of one message.

        Raises:
            InvalidRequest: The frame is larger than a peer would read.
            Overloaded: The peer reads too slowly, or not at all.
        """
        if len(frame) > FRAME_LIMIT_BYTES:
            raise InvalidRequest(
                f"a message of {len(frame)} bytes is too large; the limit is {FRAME_LIMIT_BYTES}"
            )
        if self._bytes + len(frame) > BACKLOG_LIMIT_BYTES:
            raise Overloaded(f"{self._bytes} bytes wait for a peer that does not read them")
        self._frames.append(frame)
        self._bytes += len(frame)
        self._ready.set()

    def discard(self) -> None:
        """Drop all frames."""
        self._frames.clear()
        self._bytes = 0
        if not self._closed:
            self._ready.clear()

    def close(self) -> None:
        """Let `take` return None once everything has been taken."""
        self._closed = True
        self._ready.set()

    async def take(self) -> bytes | None:
        """Wait for frames and return as many as fit into one, joined."""
        await self._ready.wait()
        batch: list[bytes] = []
        free_bytes = FRAME_LIMIT_BYTES
        while (
            self._frames
            and len(batch) < FRAME_LIMIT_MESSAGES
            and len(self._frames[0]) <= free_bytes
        ):
            batch.append(self._frames.popleft())
            free_bytes -= len(batch[-1])
        self._bytes -= FRAME_LIMIT_BYTES - free_bytes
        if not self._frames and not self._closed:
            self._ready.clear()
        return b"".join(batch) if batch else None
