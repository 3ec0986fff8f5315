"""The leases that one replica has granted: each is the right to open one session here.

On Ray Serve a lease is a streaming call held open, so Serve itself counts sessions, limits them and
drains replicas. The router takes leases through `router.leases`. Without Ray, a shared token stands
for every lease.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.errors import Unauthenticated
from cascade.protocol.services import LEASE_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from cascade.protocol.services import LeaseTicket


REMEMBERED = 64  # leases that ended last


@dataclass(slots=True)
class LeaseGrant:
    """One lease on this replica, from the grant to the end of its session."""

    token: str
    used_s: float  # when its session was last active
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseBook:
    """The leases of one replica. `shared_token` is always accepted, for tiers without Ray."""

    def __init__(
        self,
        *,
        connect_timeout_s: float,
        idle_timeout_s: float,
        shared_token: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._shared_token = shared_token
        self._clock = clock
        self._grants: dict[str, LeaseGrant] = {}
        # A session may be over before the stream that it opened for others has arrived.
        self._ended: deque[str] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._grants)

    def check(self, token: str) -> None:
        """Check that a stream with this token may open; its lease may have ended a moment ago.

        Raises:
            Unauthenticated: It is not the token of a lease.
        """
        if not (self._is_shared(token) or token in self._grants or token in self._ended):
            raise Unauthenticated(
                "the stream carries no valid lease: send the token of one in the metadata"
                f" `{LEASE_KEY}`"
            )

    def claim(self, token: str) -> None:
        """Accept a session that carries the token.

        Raises:
            Unauthenticated: No lease has this token.
        """
        if self._is_shared(token):
            return
        grant = self._grants.get(token)
        if grant is None:
            raise Unauthenticated("the session carries no valid lease; take a lease and open again")
        grant.used_s = self._clock()
        grant.opened.set()

    def touch(self, token: str) -> None:
        """Record that the session of this lease is active."""
        if grant := self._grants.get(token):
            grant.used_s = self._clock()

    def end(self, token: str) -> None:
        """End the lease, if there is one, because its session is over."""
        if grant := self._grants.pop(token, None):
            grant.ended.set()
            self._ended.append(token)

    def _is_shared(self, token: str) -> bool:
        shared = self._shared_token
        return shared is not None and secrets.compare_digest(token.encode(), shared.encode())

    async def hold(
        self, address: str, on_end: Callable[[str], None]
    ) -> AsyncGenerator[LeaseTicket]:
        """Yield one ticket, then wait until its session ends, times out or the caller leaves.

        `on_end(token)` is called last, whatever the reason, to free what the session still holds.
        """
        grant = LeaseGrant(secrets.token_urlsafe(24), self._clock())
        self._grants[grant.token] = grant
        try:
            yield {"address": address, "token": grant.token}
            await asyncio.wait_for(grant.opened.wait(), self._connect_timeout_s)
            while (left_s := grant.used_s + self._idle_timeout_s - self._clock()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(grant.ended.wait(), left_s)
                    return
        except TimeoutError:  # no session was opened
            return
        finally:
            self.end(grant.token)
            on_end(grant.token)
