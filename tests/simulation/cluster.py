"""A simulated cluster: a router, replicas of both tiers, requests, and the faults of a scenario."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.fake_replicas import HANG_S, SimDrafter, SimExpert
from tests.simulation.leases import Node, SimLeases
from tests.simulation.network import Host, Network
from tests.simulation.scenario import RandomDraftLength, Scenario

from cascade.errors import CascadeError
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import HedgedLeases
from cascade.router.router import Router, RouterOptions
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from cascade.protocol.client import Lease, SessionStream
    from cascade.protocol.codec import ServerMessage
    from cascade.types import DecodingParams, Origin, Request, SessionId, Statistics


@dataclass(kw_only=True)
class Generation:
    """One request and what its client received."""

    request: Request
    written: list[tuple[int, Origin]] = field(default_factory=list["tuple[int, Origin]"])
    error: CascadeError | None = None
    left: bool = False  # the client left, or the router ended
    finished: bool = False
    ended_s: float = 0.0
    statistics: Statistics | None = None


@dataclass(eq=False, kw_only=True)
class Cluster:
    """All parts of one simulation."""

    scenario: Scenario
    network: Network
    leases: dict[str, SimLeases]
    clients: list[ReplicaClients] = field(default_factory=list[ReplicaClients])
    log: list[str] = field(default_factory=list[str])
    violations: list[str] = field(default_factory=list[str])  # of the protocol
    generations: list[Generation] = field(default_factory=list[Generation])
    tasks: list[asyncio.Task[None]] = field(default_factory=list["asyncio.Task[None]"])

    @classmethod
    def of(cls, scenario: Scenario) -> Cluster:
        """Return a cluster without replicas."""
        return cls(
            scenario=scenario,
            network=Network(scenario.rng, scenario.conditions),
            leases={
                kind.name: SimLeases(kind, scenario.rng, max_leases=scenario.max_leases)
                for kind in (services.DRAFTER, services.EXPERT)
            },
        )

    def record(self, event: str) -> None:
        """Add a line to the log."""
        self.log.append(f"{asyncio.get_running_loop().time():9.4f} {event}")

    def nodes(self) -> list[Node]:
        """Return the nodes of both tiers, including killed ones."""
        return [node for leases in self.leases.values() for node in leases.nodes]

    def start(self, name: str) -> None:
        """Start a replica of a tier."""
        scenario, tier = self.scenario, self.leases[name]
        make = SimDrafter if name == "drafter" else SimExpert
        step_s = 2 * scenario.conditions.delay_s
        replica = make(
            scenario.rng,
            step_s=step_s,
            full_prob=scenario.full_prob,
            violations=self.violations,
        )
        replica.address = f"{name}-{len(tier.nodes)}"
        replica.server._limits = replica.describe()  # pyright: ignore[reportPrivateUsage] - no address is bound
        host = Host(server=replica.server)
        self.network.hosts[replica.address] = host
        started_s = asyncio.get_running_loop().time()
        tier.nodes.append(Node(replica=replica, host=host, started_s=started_s))

    def inject(self, fault: str) -> None:
        """Let a fault hit a random node."""
        node = self.scenario.rng.choice([node for node in self.nodes() if node.host.up] or [None])
        if node is not None:
            self.record(f"{fault} {node.replica.address}")
            self._inject(node, fault)

    def _inject(self, node: Node, fault: str) -> None:
        rng, address = self.scenario.rng, node.replica.address
        match fault:
            case "kill" | "silent":
                self._kill(node, silently=fault == "silent")
            case "cut":
                self.network.cut(address, for_s=_faulty(node, rng.choice([0.05, 1.0, 6.0, 12.0])))
            case "stall":
                for_s = _faulty(node, rng.choice([0.1, 3.0, 2 * HANG_S]))
                node.replica.engine.stall(for_s=for_s)
            case "streams":
                self.network.end_calls(address)
            case "leases":
                _end_leases(node)
            case _:
                self._end_router()

    def _kill(self, node: Node, *, silently: bool) -> None:
        """Stop a replica; another starts later."""
        node.kill()
        self.network.kill(node.replica.address, silently=silently)
        name = node.replica.address.split("-")[0]
        after_s = self.scenario.rng.choice([0.1, 2.0, 40.0])
        asyncio.get_running_loop().call_later(after_s, self.start, name)

    def _end_router(self) -> None:
        """End the router's streams, leases and generations, without a graceful close."""
        for node in self.nodes():
            self.network.end_calls(node.replica.address)
            _end_leases(node)
        for task, generation in zip(self.tasks, self.generations, strict=True):
            generation.left = generation.left or not task.done()
            task.cancel()


class CheckedClients(ReplicaClients):
    """Reports messages that reach a session of another epoch."""

    violations: list[str]

    def open_stream(self, lease: Lease, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a stream that is checked."""
        stream = super().open_stream(lease, session_id, epoch)
        deliver = stream.deliver

        def checked(message: ServerMessage, size: int) -> None:
            if message.epoch != epoch:
                self.violations.append(f"a message of epoch {message.epoch} reached epoch {epoch}")
            deliver(message, size)

        stream.deliver = checked
        return stream


def _faulty(node: Node, for_s: float) -> float:
    """Record that a node cannot serve for a while."""
    now_s = asyncio.get_running_loop().time()
    node.faults.append((now_s, now_s + for_s))
    return for_s


def _end_leases(node: Node) -> None:
    for hold in list(node.holds):
        hold.cancel()


async def _generate(cluster: Cluster, router: Router, generation: Generation) -> None:
    rng, span_s = cluster.scenario.rng, cluster.scenario.span_s
    leaves = rng.random() < 0.1
    await asyncio.sleep(span_s * rng.random())
    try:
        async with asyncio.timeout(span_s * rng.random() if leaves else None):
            await _collect(router, generation)
    except TimeoutError:
        generation.left = True
    except CascadeError as error:
        generation.error = error
    generation.ended_s = asyncio.get_running_loop().time()
    cluster.record(f"generation {cluster.generations.index(generation)}: {generation}")


async def _collect(router: Router, generation: Generation) -> None:
    async with aclosing(router.generate(generation.request)) as chunks:
        async for chunk in chunks:
            generation.written.extend(zip(chunk.tokens, chunk.origins, strict=True))
            generation.statistics = chunk.statistics
            assert not generation.finished, "a chunk after the last"
            generation.finished = chunk.finish is not None


async def run_scenario(cluster: Cluster) -> None:
    """Start the replicas, send the requests and inject the faults, until every request ends."""
    scenario, rng = cluster.scenario, cluster.scenario.rng
    for name, count in scenario.counts.items():
        for _ in range(count):
            cluster.start(name)
    router = _router(cluster)
    loop = asyncio.get_running_loop()
    for fault in scenario.faults:
        loop.call_later(scenario.span_s * rng.random(), cluster.inject, fault)
    cluster.generations += [
        Generation(request=scenario.request()) for _ in range(rng.choice([1, 2, 3]))
    ]
    cluster.tasks += [
        asyncio.create_task(_generate(cluster, router, generation))
        for generation in cluster.generations
    ]
    for task in cluster.tasks:
        with suppress(asyncio.CancelledError):  # with the router
            await task


def _router(cluster: Cluster) -> Router:
    tiers: dict[str, TierClient] = {}
    for kind in (services.DRAFTER, services.EXPERT):
        clients = CheckedClients(kind, dial=cluster.network.dial)
        clients.violations = cluster.violations
        cluster.clients.append(clients)
        tiers[kind.name] = TierClient(
            leases=HedgedLeases(cluster.leases[kind.name], after_s=RouterOptions().lease_hedge_s),
            clients=clients,
        )
    rng = cluster.scenario.rng

    def automatic(policy: DecodingParams) -> RandomDraftLength:
        del policy
        return RandomDraftLength(rng=rng)

    return Router(
        drafters=tiers["drafter"],
        experts=tiers["expert"],
        automatic=automatic,
        options=RouterOptions(
            draft_deadline_s=rng.choice([0.05, 2.0]),
            draft_pause_s=0.1,
            overlap_blocks=rng.choice([0, 1, 1, 2]),
            overlap_branches=rng.choice([0, 2, 4]),
        ),
    )
