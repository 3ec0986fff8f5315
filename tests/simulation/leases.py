"""What Serve does for a tier: it routes lease calls, and notices late that a replica is gone."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.errors import Overloaded

if TYPE_CHECKING:
    from random import Random

    from tests.simulation.fake_replicas import SimDrafter, SimExpert
    from tests.simulation.network import Host

    from cascade.protocol.services import LeaseTicket, TierKind

DETECTION_S = 1.0  # until Serve notices that a replica is gone
TIMEOUT_S = 8.0  # of a call
LATENCY_S = 0.002


@dataclass(eq=False, kw_only=True)
class Node:
    """A replica, its host, and the lease calls that it holds."""

    replica: SimDrafter | SimExpert
    host: Host
    holds: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    routed_until_s: float = float("inf")  # when Serve stops sending calls here
    calls: int = 0  # that wait for a ticket
    started_s: float = 0.0
    faults: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def usable(self, since_s: float, until_s: float) -> bool:
        """Return whether it was there without a fault all that time."""
        faulty = any(begins_s < until_s and since_s < ends_s for begins_s, ends_s in self.faults)
        return self.started_s <= since_s and not faulty

    def kill(self) -> None:
        """Stop the process."""
        now_s = asyncio.get_running_loop().time()
        self.routed_until_s = now_s + DETECTION_S
        self.faults.append((now_s, float("inf")))
        self.replica.engine.stop()
        for hold in self.holds:
            hold.cancel()


class SimLease:
    """A call held open on a node."""

    def __init__(self, node: Node) -> None:
        self.address = node.replica.address
        self.token = ""
        self._node = node
        self._granted: asyncio.Future[LeaseTicket] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold())
        node.holds.add(self._task)
        self._task.add_done_callback(node.holds.discard)

    async def granted(self) -> None:
        """Wait for the ticket."""
        self.token = (await self._granted)["token"]

    def close(self) -> None:
        """Cancel the call; the node notices as soon as the network is not cut."""
        loop = asyncio.get_running_loop()
        loop.call_at(max(loop.time(), self._node.host.cut_until_s) + LATENCY_S, self._task.cancel)

    async def _hold(self) -> None:
        async with aclosing(self._node.replica.lease()) as tickets:
            async for ticket in tickets:
                if not self._granted.done():
                    self._granted.set_result(ticket)


class SimLeases:
    """Takes leases on the nodes that Serve routes to."""

    def __init__(self, kind: TierKind, rng: Random, *, max_leases: int) -> None:
        self.nodes: list[Node] = []
        self._kind = kind
        self._rng = rng
        self._max_leases = max_leases  # of one node

    async def take(self) -> SimLease:
        """Return a lease on a node with a free slot."""
        await asyncio.sleep(LATENCY_S * self._rng.expovariate(1))
        now_s = asyncio.get_running_loop().time()
        routed = [node for node in self.nodes if now_s < node.routed_until_s]
        if not routed:
            raise self._kind.unavailable("no replica")
        free = [node for node in routed if len(node.holds) < self._max_leases]
        if not free:
            raise Overloaded("every replica is taken")
        least = min(node.calls for node in free)
        node = self._rng.choice([node for node in free if node.calls == least])
        if not node.host.up:
            raise self._kind.unavailable("the replica is gone")
        return await self._call(node)

    async def _call(self, node: Node) -> SimLease:
        """Wait for a ticket, which comes as soon as the network is not cut."""
        cut_s = node.host.cut_until_s - asyncio.get_running_loop().time()
        node.calls += 1
        try:
            await asyncio.sleep(min(max(0.0, cut_s), TIMEOUT_S))
        finally:
            node.calls -= 1
        if cut_s > TIMEOUT_S:
            raise self._kind.unavailable("no replica answered")
        lease = SimLease(node)
        try:
            await lease.granted()
        except asyncio.CancelledError:
            lease.close()
            raise
        return lease
