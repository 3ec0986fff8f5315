"""One seed, one story: a router, its tiers, some answers, and what goes wrong meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.leases import Node, SimLeases
from tests.simulation.network import Host, Network
from tests.simulation.story import Story, Whim
from tests.simulation.toys import HANGS_S, ToyDrafter, ToyExpert

from cascade.errors import CascadeError
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import HedgedLeases
from cascade.router.router import Router, RouterOptions
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from cascade.protocol.client import SessionStream
    from cascade.protocol.codec import ServerMessage
    from cascade.types import DecodingParams, Origin, Request, SessionId, Statistics


@dataclass(kw_only=True)
class Outcome:
    """What became of one answer."""

    request: Request
    written: list[tuple[int, Origin]] = field(default_factory=list["tuple[int, Origin]"])
    error: CascadeError | None = None
    left: bool = False
    finished: bool = False
    ended_s: float = 0.0
    statistics: Statistics | None = None


@dataclass(eq=False, kw_only=True)
class World:
    """Everything there is."""

    story: Story
    network: Network
    leases: dict[str, SimLeases]
    peers: list[ReplicaClients] = field(default_factory=list[ReplicaClients])
    log: list[str] = field(default_factory=list[str])
    broken: list[str] = field(default_factory=list[str])  # what should never happen, and did
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    answers: list[asyncio.Task[None]] = field(default_factory=list["asyncio.Task[None]"])

    @classmethod
    def of(cls, story: Story) -> World:
        """Return a world in which nothing has happened yet."""
        return cls(
            story=story,
            network=Network(story.chance, story.weather),
            leases={
                kind.name: SimLeases(kind, story.chance, most=story.most)
                for kind in (services.DRAFTER, services.EXPERT)
            },
        )

    def note(self, event: str) -> None:
        """Write down what happens."""
        self.log.append(f"{asyncio.get_running_loop().time():9.4f} {event}")

    def nodes(self) -> list[Node]:
        """Return the nodes of both tiers, the dead too."""
        return [node for leases in self.leases.values() for node in leases.nodes]

    def start(self, name: str) -> None:
        """Start a replica of a tier."""
        story, tier = self.story, self.leases[name]
        make = ToyDrafter if name == "drafter" else ToyExpert
        step_s = 2 * story.weather.delay_s
        replica = make(story.chance, step_s=step_s, full=story.full, broken=self.broken)
        replica.address = f"{name}-{len(tier.nodes)}"
        replica.server._limits = replica.describe()  # pyright: ignore[reportPrivateUsage] - no address is bound
        host = Host(server=replica.server)
        self.network.hosts[replica.address] = host
        born_s = asyncio.get_running_loop().time()
        tier.nodes.append(Node(replica=replica, host=host, born_s=born_s))

    def trouble(self, what: str) -> None:
        """Let something go wrong."""
        node = self.story.chance.choice([node for node in self.nodes() if node.host.up] or [None])
        if node is not None:
            self.note(f"{what} {node.replica.address}")
            self._befall(node, what)

    def _befall(self, node: Node, what: str) -> None:
        chance, address = self.story.chance, node.replica.address
        match what:
            case "kill" | "silent":
                self._kill(node, silently=what == "silent")
            case "cut":
                self.network.cut(address, for_s=_ill(node, chance.choice([0.05, 1.0, 6.0, 12.0])))
            case "stall":
                node.replica.engine.stall(for_s=_ill(node, chance.choice([0.1, 3.0, 2 * HANGS_S])))
            case "streams":
                self.network.end_calls(address)
            case "leases":
                _end(node)
            case _:
                self._end_router()

    def _kill(self, node: Node, *, silently: bool) -> None:
        """End a replica; another starts later."""
        node.kill()
        self.network.kill(node.replica.address, silently=silently)
        name = node.replica.address.split("-")[0]
        after_s = self.story.chance.choice([0.1, 2.0, 40.0])
        asyncio.get_running_loop().call_later(after_s, self.start, name)

    def _end_router(self) -> None:
        """End the router's streams, its calls and its answers, and no word of farewell."""
        for node in self.nodes():
            self.network.end_calls(node.replica.address)
            _end(node)
        for answer, outcome in zip(self.answers, self.outcomes, strict=True):
            outcome.left = outcome.left or not answer.done()
            answer.cancel()


class Watched(ReplicaClients):
    """Notes answers of another epoch than the session's."""

    broken: list[str]

    def open_stream(self, address: str, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a link that is watched."""
        link = super().open_stream(address, session_id, epoch)
        deliver = link.deliver

        def watched(answer: ServerMessage, size: int) -> None:
            if answer.epoch != epoch:
                self.broken.append(f"an answer of epoch {answer.epoch} reached epoch {epoch}")
            deliver(answer, size)

        link.deliver = watched
        return link


def _ill(node: Node, for_s: float) -> float:
    """Remember that a node cannot serve for a while."""
    now_s = asyncio.get_running_loop().time()
    node.faults.append((now_s, now_s + for_s))
    return for_s


def _end(node: Node) -> None:
    """End every lease of a node."""
    for hold in list(node.holds):
        hold.cancel()


async def _ask(world: World, router: Router, outcome: Outcome) -> None:
    chance, span_s = world.story.chance, world.story.span_s
    leaves = chance.random() < 0.1
    await asyncio.sleep(span_s * chance.random())
    try:
        async with asyncio.timeout(span_s * chance.random() if leaves else None):
            await _read(router, outcome)
    except TimeoutError:
        outcome.left = True
    except CascadeError as error:
        outcome.error = error
    outcome.ended_s = asyncio.get_running_loop().time()
    world.note(f"answer {world.outcomes.index(outcome)}: {outcome}")


async def _read(router: Router, outcome: Outcome) -> None:
    async with aclosing(router.generate(outcome.request)) as pieces:
        async for piece in pieces:
            outcome.written.extend(zip(piece.tokens, piece.origins, strict=True))
            outcome.statistics = piece.statistics
            assert not outcome.finished, "a piece after the last"
            outcome.finished = piece.finish is not None


async def happen(world: World) -> None:
    """Let the answers be written and the troubles come, until every answer has ended."""
    story, chance = world.story, world.story.chance
    for name, count in story.counts.items():
        for _ in range(count):
            world.start(name)
    router = _router(world)
    loop = asyncio.get_running_loop()
    for what in story.troubles:
        loop.call_later(story.span_s * chance.random(), world.trouble, what)
    world.outcomes += [Outcome(request=story.request()) for _ in range(chance.choice([1, 2, 3]))]
    world.answers += [
        asyncio.create_task(_ask(world, router, outcome)) for outcome in world.outcomes
    ]
    for answer in world.answers:
        with suppress(asyncio.CancelledError):  # with the router
            await answer


def _router(world: World) -> Router:
    made: dict[str, TierClient] = {}
    for kind in (services.DRAFTER, services.EXPERT):
        peers = Watched(kind, dial=world.network.dial)
        peers.broken = world.broken
        world.peers.append(peers)
        made[kind.name] = TierClient(
            leases=HedgedLeases(world.leases[kind.name], after_s=1.0), clients=peers
        )
    chance = world.story.chance

    def automatic(policy: DecodingParams) -> Whim:
        del policy
        return Whim(chance=chance)

    return Router(
        drafters=made["drafter"],
        experts=made["expert"],
        automatic=automatic,
        options=RouterOptions(
            draft_deadline_s=chance.choice([0.05, 2.0]),
            draft_pause_s=0.1,
            overlap_blocks=chance.choice([0, 1, 1, 2]),
            overlap_branches=chance.choice([0, 2, 4]),
        ),
    )
