"""Leases: the right to open one session on one replica, for the length of a generation.

A tier's `LeaseBook` grants them; the router takes them through a `LeaseSource`. On Ray Serve a
lease is a streaming call held open, so that Serve counts, drains and bounds sessions by itself;
without Ray the addresses are given and a shared token stands for the lease.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.errors import Unauthenticated

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from cascade.protocol.services import LeaseTicket


@dataclass(slots=True)
class LeaseGrant:
    """One lease on this replica, from the grant to the end of its session."""

    token: str
    used_s: float
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseBook:
    """The leases of one replica. `standing` is a token that is always good (tiers without Ray)."""

    def __init__(
        self,
        *,
        connect_timeout_s: float,
        idle_timeout_s: float,
        standing: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._standing = standing
        self._clock = clock
        self._grants: dict[str, LeaseGrant] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def claim(self, token: str) -> None:
        """Accept a session that carries the token; raises Unauthenticated for an unknown one."""
        if self._standing is not None and secrets.compare_digest(token, self._standing):
            return
        grant = self._grants.get(token)
        if grant is None:
            raise Unauthenticated("the session carries no valid lease; take a lease and open again")
        grant.used_s = self._clock()
        grant.opened.set()

    def touch(self, token: str) -> None:
        """Note that the session of this lease is alive."""
        if grant := self._grants.get(token):
            grant.used_s = self._clock()

    def end(self, token: str) -> None:
        """End the lease, if there is one; its session is over."""
        if grant := self._grants.pop(token, None):
            grant.ended.set()

    async def hold(self, address: str, drop: Callable[[str], None]) -> AsyncGenerator[LeaseTicket]:
        """Yield one ticket, then stay until its session ends, idles too long or the caller leaves.

        `drop(token)` is called last, whatever the reason, to free what the session still holds.
        """
        grant = LeaseGrant(secrets.token_urlsafe(24), self._clock())
        self._grants[grant.token] = grant
        try:
            yield {"address": address, "token": grant.token}
            if await _within(grant.opened, self._connect_timeout_s):
                await self._until_ended(grant)
        finally:
            self.end(grant.token)
            drop(grant.token)

    async def _until_ended(self, grant: LeaseGrant) -> None:
        while (left_s := grant.used_s + self._idle_timeout_s - self._clock()) > 0:
            if await _within(grant.ended, left_s):
                return


async def _within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True
