"""Bounds what is on its way from others: how long it may take, and how much there may be."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Arrivals:
    """The messages that one process is receiving.

    One more than there may be ends the oldest of the sender that has most under way. So whoever
    sends many slowly keeps nobody else out, and what arrives at once is never ended.
    """

    def __init__(self) -> None:
        self._open: dict[asyncio.Timeout, str] = {}  # with the sender, the oldest first

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def place(self, sender: str, *, most: int, within_s: float) -> AsyncGenerator[None]:
        """Let a message arrive, until the end of the `with`.

        Args:
            sender: Whose it is.
            most: Messages at the same time.
            within_s: How long it may take.

        Raises:
            TimeoutError: It took longer, or gave its place to another.
        """
        if len(self._open) >= most:
            [(busiest, _)] = Counter(self._open.values()).most_common(1)
            oldest = next(one for one, whose in self._open.items() if whose == busiest)
            del self._open[oldest]
            if not oldest.expired():
                oldest.reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(within_s) as deadline:
            self._open[deadline] = sender
            try:
                yield
            finally:
                self._open.pop(deadline, None)
