"""What waits to be written to a stream: everything put in one tick leaves as one frame."""

from __future__ import annotations

import asyncio
from collections import deque

from cascade.errors import InvalidRequest, Overloaded
from cascade.protocol.services import FRAME_LIMIT_BYTES, FRAME_LIMIT_MESSAGES

# What a peer that has stopped reading may cost us.
BACKLOG_LIMIT_BYTES = 4 * FRAME_LIMIT_BYTES


class WriteBuffer:
    """One-item frames on their way to a single writer; lives on one event loop."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, frame: bytes) -> None:
        """Add a frame of one item.

        Raises:
            InvalidRequest: the frame is larger than a peer would read.
            Overloaded: the peer reads too slowly, or not at all.
        """
        if len(frame) > FRAME_LIMIT_BYTES:
            raise InvalidRequest(
                f"an item of {len(frame)} bytes is too large; the limit is {FRAME_LIMIT_BYTES}"
            )
        if self._bytes + len(frame) > BACKLOG_LIMIT_BYTES:
            raise Overloaded(f"{self._bytes} bytes wait for a peer that does not read them")
        self._frames.append(frame)
        self._bytes += len(frame)
        self._ready.set()

    def discard(self) -> None:
        """Forget what waits."""
        self._frames.clear()
        self._bytes = 0
        if not self._closed:
            self._ready.clear()

    def close(self) -> None:
        """Let `take` return None once everything has been taken."""
        self._closed = True
        self._ready.set()

    async def take(self) -> bytes | None:
        """Wait for items and return them as one frame, within the limits of a frame."""
        await self._ready.wait()
        batch: list[bytes] = []
        room = FRAME_LIMIT_BYTES
        while self._frames and len(batch) < FRAME_LIMIT_MESSAGES and len(self._frames[0]) <= room:
            batch.append(self._frames.popleft())
            room -= len(batch[-1])
        self._bytes -= FRAME_LIMIT_BYTES - room
        if not self._frames and not self._closed:
            self._ready.clear()
        return b"".join(batch) if batch else None
