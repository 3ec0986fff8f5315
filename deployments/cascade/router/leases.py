"""How the router takes leases: the right to open one session on one replica.

On Ray Serve a lease is a streaming call held open, so that Serve itself counts sessions, drains
replicas and limits their load. Without Ray, addresses are given and one token is shared.
`replica.lease_book` grants leases on the other side.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cascade.errors import CascadeError, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.protocol.services import LeaseTicket, TierKind


class Lease(Protocol):
    """A lease that a router holds."""

    address: str
    token: str

    def close(self) -> None:
        """Release the lease; safe to repeat."""
        ...


class LeaseSource(Protocol):
    """Where the router takes leases on replicas of one tier."""

    async def take(self) -> Lease:
        """Return a lease; raises Overloaded, DrafterUnavailable or ExpertUnavailable."""
        ...


@dataclass(slots=True)
class FixedLease:
    """A lease on a tier that runs without Ray."""

    address: str
    token: str

    def close(self) -> None:
        """Do nothing: the tier frees the session when its stream closes."""


class FixedLeases:
    """Hands out given addresses in turn, all with one shared token."""

    def __init__(self, addresses: Sequence[str], *, token: str) -> None:
        self._addresses = itertools.cycle(addresses)
        self._token = token

    async def take(self) -> FixedLease:
        """Return the next address; never waits."""
        return FixedLease(next(self._addresses), self._token)


class HedgedLeases:
    """Sends another request if the first is not granted soon, since its replica may hang.

    The wait doubles each time. The first lease granted is returned; other requests are cancelled.
    """

    def __init__(self, source: LeaseSource, *, after_s: float) -> None:
        self._source = source
        self._after_s = after_s

    async def take(self) -> Lease:
        """Return the first lease that is granted; if all requests fail, raises the last error."""
        calls, after_s = [self._request()], self._after_s
        try:
            while True:
                done, _ = await asyncio.wait(
                    calls, timeout=after_s, return_when=asyncio.FIRST_COMPLETED
                )
                for call in sorted(done, key=calls.index):
                    calls.remove(call)
                    if call.exception() is None or not calls:
                        return call.result()
                if not done:
                    calls.append(self._request())
                    after_s *= 2
        finally:
            for call in calls:
                call.add_done_callback(release_when_granted)
                call.cancel()

    def _request(self) -> asyncio.Future[Lease]:
        return asyncio.ensure_future(self._source.take())


def release_when_granted(call: asyncio.Future[Lease]) -> None:
    """Close a lease that was granted after its caller had gone."""
    if not call.cancelled() and call.exception() is None:
        call.result().close()


class ServeLease:
    """A lease call of Serve, held open until `close`."""

    def __init__(self, call: Any, ticket: LeaseTicket, *, released: Callable[[], None]) -> None:
        self.address = ticket["address"]
        self.token = ticket["token"]
        self._call = call
        self._released: Callable[[], None] | None = released

    def close(self) -> None:
        """Cancel the call: dropping it would leave its slot occupied."""
        self._call.cancel()
        if self._released is not None:
            self._released()
            self._released = None


class ServeLeases:
    """Takes leases on the replicas of a Serve deployment, through its handle."""

    def __init__(self, handle: Any, *, kind: TierKind, timeout_s: float) -> None:
        # Serve's gRPC transport ends the call when its caller is killed; actor calls leak then.
        self._handle = handle.options(stream=True, _by_reference=False)
        self._kind = kind
        self._timeout_s = timeout_s
        self._held = 0

    async def take(self) -> ServeLease:
        """Ask Serve for a replica.

        Raises:
            Overloaded: Its queue is full, or no slot came free in time.
            Unavailable: No replica answers.
        """
        from ray.exceptions import RayError  # noqa: PLC0415 - tiers run without Ray
        from ray.serve.exceptions import (  # noqa: PLC0415 - as above
            BackPressureError,
            DeploymentUnavailableError,
        )

        call = self._handle.lease.remote()
        try:
            ticket: LeaseTicket = await asyncio.wait_for(anext(aiter(call)), self._timeout_s)
        except BackPressureError as error:
            raise Overloaded(
                f"every {self._kind.name} replica is taken and the queue is full"
            ) from error
        except TimeoutError as error:
            call.cancel()
            raise self._timeout_error() from error
        except (DeploymentUnavailableError, RayError, StopAsyncIteration) as error:
            call.cancel()
            raise self._kind.unavailable(f"no {self._kind.name} replica answers") from error
        except asyncio.CancelledError:
            call.cancel()
            raise
        self._held += 1
        return ServeLease(call, ticket, released=self._release)

    def _release(self) -> None:
        self._held -= 1

    def _timeout_error(self) -> CascadeError:
        """Return the error for a timeout: a router without any lease takes the tier for absent."""
        within = f"within {self._timeout_s:g} s"
        if self._held:
            return Overloaded(f"no {self._kind.name} replica came free {within}")
        return self._kind.unavailable(f"no {self._kind.name} replica answered {within}")
