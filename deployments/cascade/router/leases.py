"""How the router takes leases: the right to open one session on one replica.

On Ray Serve a lease is a streaming call held open, so that Serve itself counts sessions, drains
replicas and limits their load. Without Ray, addresses are given and one token is shared.
`replica.lease_book` grants leases on the other side.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cascade.errors import CascadeError, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.protocol.services import LeaseTicket, TierKind
    from cascade.types import Caller

ASKED_AT_ONCE = 32  # lease requests under way; each may be hedged several times


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


@dataclass(eq=False, slots=True)
class _Waiter:
    """A session that waits for a lease."""

    caller: Caller
    number: int  # grows with each arrival
    granted: asyncio.Future[Lease] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class LeaseQueue:
    """Lets sessions wait for leases by turns, of callers and of the connections of a caller.

    A caller has as many turns in a row as its weight says, by default one.

    As many leases are asked for as sessions wait; whichever is granted goes to the session whose
    turn it is then, so that a caller with many sessions does not keep the others waiting. If the
    queue is full, the last session of the caller that has most of them waiting is refused.
    """

    def __init__(self, source: LeaseSource, *, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._waiters: dict[_Waiter, None] = {}  # in the order of arrival
        self._turns: dict[str, dict[str, deque[_Waiter]]] = {}  # by caller and connection
        self._taken: dict[str, int] = {}  # turns in a row, of the callers with some left
        self._asked: dict[asyncio.Future[Lease], int] = {}  # with the number of the last arrival
        self._numbers = itertools.count()

    async def take(self, caller: Caller) -> Lease:
        """Return a lease.

        Raises:
            Overloaded: The queue, or the tier's own, is full.
            Unavailable: No replica answers.
        """
        if len(self._waiters) >= self._limit:
            self._refuse_one(caller)
        waiter = _Waiter(caller, next(self._numbers))
        self._waiters[waiter] = None
        connections = self._turns.setdefault(caller.name, {})
        connections.setdefault(caller.connection, deque()).append(waiter)
        self._ask()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._grant(waiter.granted.result())
            raise
        finally:
            self._remove(waiter)
            self._ask()

    def _ask(self) -> None:
        """Ask for as many leases as sessions wait."""
        wanted = min(len(self._waiters), ASKED_AT_ONCE)
        while len(self._asked) < wanted:
            request = asyncio.ensure_future(self._source.take())
            self._asked[request] = next(self._numbers)
            request.add_done_callback(self._answered)
        while len(self._asked) > wanted:
            request, _ = self._asked.popitem()
            request.add_done_callback(release_when_granted)
            request.cancel()

    def _answered(self, request: asyncio.Future[Lease]) -> None:
        number = self._asked.pop(request, None)
        if number is None or request.cancelled():
            return  # nobody waited for it any more
        error = request.exception()
        if error is None:
            self._grant(request.result())
        # A session that came after this request keeps waiting for the answer to a later one.
        elif (oldest := next(iter(self._waiters), None)) and oldest.number < number:
            self._fail(oldest, error)
        self._ask()

    def _grant(self, lease: Lease) -> None:
        """Give a lease to the session whose turn it is."""
        while self._turns:
            name, connections = next(iter(self._turns.items()))
            connection, waiters = next(iter(connections.items()))
            waiter = waiters[0]
            # The caller goes behind all others after its turns, and so does the connection.
            self._taken[name] = self._taken.get(name, 0) + 1
            if self._taken[name] >= waiter.caller.weight:
                del self._taken[name]
                self._turns[name] = self._turns.pop(name)
            connections[connection] = connections.pop(connection)
            self._remove(waiter)
            if not waiter.granted.done():  # else it has left
                waiter.granted.set_result(lease)
                return
        lease.close()

    def _refuse_one(self, caller: Caller) -> None:
        """Make room for a session; raises Overloaded if its caller has most sessions waiting."""
        waiting = {
            name: [waiter for waiters in connections.values() for waiter in waiters]
            for name, connections in self._turns.items()
        }
        longest = max(waiting.values(), key=len, default=[])
        error = Overloaded(f"{self._limit} requests wait already; this caller has most of them")
        if len(waiting.get(caller.name, ())) + 1 >= len(longest):
            raise error
        self._fail(max(longest, key=lambda waiter: waiter.number), error)

    def _fail(self, waiter: _Waiter, error: BaseException) -> None:
        self._remove(waiter)
        if not waiter.granted.done():
            waiter.granted.set_exception(error)

    def _remove(self, waiter: _Waiter) -> None:
        if waiter not in self._waiters:
            return
        del self._waiters[waiter]
        name, connection = waiter.caller.name, waiter.caller.connection
        self._turns[name][connection].remove(waiter)
        if not self._turns[name][connection]:
            del self._turns[name][connection]
        if not self._turns[name]:
            del self._turns[name]
            self._taken.pop(name, None)


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
