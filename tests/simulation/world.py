"""One seed, one story: a router, its tiers, some answers, and what goes wrong meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from cascade.decoding.draft_length import Length
from cascade.decoding.generation import Piece, Request, Statistics
from cascade.decoding.session import Mode, Policy, Sampling
from cascade.errors import CascadeError, DeadlineExceeded, Overloaded, Unavailable
from cascade.operations.places import Tier
from cascade.router import Router, RouterOptions
from cascade.wire import tiers
from cascade.wire.channel import Peers

from .leases import Node, SimLeases
from .network import Host, Network, Weather
from .toys import STOP, VOCABULARY, ToyDrafter, ToyExpert, answer

if TYPE_CHECKING:
    from cascade.decoding.cost import Lesson

FREED_S = 2.0  # after the last answer, until both tiers are free
SETTLED_S = 60.0  # by when every timer has run out


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happens, drawn from a seed."""

    seed: int
    chance: Random
    weather: Weather
    counts: dict[str, int]  # replicas of each tier
    troubles: int
    span_s: float  # in which they come
    full: float
    most: int

    @classmethod
    def of(cls, seed: int) -> Story:
        chance = Random(seed)  # noqa: S311 - a story, no secret
        foul = chance.random() < 0.4
        weather = Weather(
            delay_s=chance.choice([0.0005, 0.002, 0.02]),
            dropped=chance.choice([0, 0.02, 0.1]) if foul else 0,
            repeated=chance.choice([0, 0.05, 0.3]) if foul else 0,
            reordered=chance.choice([0, 0.1, 0.5]) if foul else 0,
        )
        return cls(
            seed=seed,
            chance=chance,
            weather=weather,
            counts={"drafter": chance.choice([0, 1, 1, 2]), "expert": chance.choice([1, 2, 3])},
            troubles=chance.choice([0, 1, 1, 2, 4]),
            span_s=chance.choice([0.02, 0.1, 1.0]),
            full=chance.choice([0, 0, 0.1]),
            most=chance.choice([1, 2, 8]),
        )


@dataclass(kw_only=True)
class Whim:
    """Draft lengths of no reason."""

    chance: Random

    def next(self, *, room: int) -> Length:
        """Return any length."""
        tokens = max(0, min(room, self.chance.choice([0, 1, 2, 3, 5])))
        return Length(tokens=tokens, reason="whim", alone=self.chance.choice([1, 2, 4]))

    def learn(self, lesson: Lesson) -> None:
        """Learn nothing."""


@dataclass(eq=False, kw_only=True)
class World:
    """Everything there is."""

    story: Story
    network: Network
    leases: dict[str, SimLeases]
    peers: list[Peers] = field(default_factory=list[Peers])
    log: list[str] = field(default_factory=list[str])
    outcomes: list[Outcome] = field(default_factory=list["Outcome"])

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
        replica = make(story.chance, step_s=2 * story.weather.delay_s, full=story.full)
        replica.address = f"{name}-{len(tier.nodes)}"
        replica.server._limits = replica.describe()  # pyright: ignore[reportPrivateUsage] - no address is bound
        host = Host(server=replica.server)
        self.network.hosts[replica.address] = host
        tier.nodes.append(Node(replica=replica, host=host))

    def kill(self, node: Node, *, silently: bool) -> None:
        """End a replica; another starts later."""
        chance = self.story.chance
        self.note(f"kill {node.replica.address}")
        node.kill()
        self.network.kill(node.replica.address, silently=silently)
        name = node.replica.address.split("-")[0]
        asyncio.get_running_loop().call_later(chance.choice([0.1, 2.0, 30.0]), self.start, name)

    def trouble(self) -> None:
        """Let something go wrong."""
        chance = self.story.chance
        node = chance.choice([node for node in self.nodes() if node.host.up] or self.nodes())
        address = node.replica.address
        what = chance.choice(["kill", "silent", "cut", "stall", "streams", "leases"])
        self.note(f"{what} {address}")
        match what:
            case _ if not node.host.up:
                pass
            case "kill" | "silent":
                self.kill(node, silently=what == "silent")
            case "cut":
                self.network.cut(address, for_s=chance.choice([0.05, 1.0, 5.0, 30.0]))
            case "stall":
                node.replica.engine.stall(for_s=chance.choice([0.1, 3.0, 20.0]))
            case "streams":
                self.network.end_calls(address)
            case _:
                for hold in list(node.holds):
                    hold.cancel()


@dataclass(kw_only=True)
class Outcome:
    """What became of one answer."""

    wanted: tuple[int, ...]
    got: list[int] = field(default_factory=list[int])
    error: CascadeError | None = None
    left: bool = False
    finished: bool = False
    statistics: Statistics | None = None


async def _ask(world: World, router: Router, number: int) -> Outcome:
    chance = world.story.chance
    prompt = tuple(chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 2, 6])))
    limit = chance.choice([1, 6, 12])
    stop_ids = (STOP,) if chance.random() < 0.3 else ()
    outcome = Outcome(wanted=answer(prompt, limit=limit, stop_ids=stop_ids))
    request = Request(
        prompt=prompt,
        policy=Policy(sampling=Sampling(temperature=0.0), stop_ids=stop_ids),
        mode=chance.choice([Mode.SPECULATIVE, Mode.SPECULATIVE, Mode.EXPERT_ONLY]),
        max_tokens=limit,
    )
    leaves = chance.random() < 0.1
    await asyncio.sleep(world.story.span_s * chance.random())
    try:
        async with asyncio.timeout(world.story.span_s * chance.random() if leaves else None):
            await _read(router, request, outcome)
    except TimeoutError:
        outcome.left = True
    except CascadeError as error:
        outcome.error = error
    world.note(f"answer {number}: {outcome}")
    return outcome


async def _read(router: Router, request: Request, outcome: Outcome) -> None:
    async with aclosing(router.generate(request)) as pieces:
        async for piece in pieces:
            _hear(outcome, piece)


def _hear(outcome: Outcome, piece: Piece) -> None:
    outcome.got.extend(piece.tokens)
    outcome.statistics = piece.statistics
    assert not outcome.finished, "a piece after the last"
    outcome.finished = piece.finish is not None


async def _live(world: World) -> None:
    story, chance = world.story, world.story.chance
    for name, leases in world.leases.items():
        for _ in range(story.counts[name]):
            world.start(name)
        assert leases.nodes or name == "drafter"
    made = {}
    for kind in (tiers.DRAFTER, tiers.EXPERT):
        peers = Peers(kind, dial=world.network.dial)
        world.peers.append(peers)
        made[kind.name] = Tier(leases=world.leases[kind.name], peers=peers)
    router = Router(
        drafters=made["drafter"],
        experts=made["expert"],
        automatic=lambda _: Whim(chance=chance),
        options=RouterOptions(draft_deadline_s=chance.choice([0.05, 2.0]), draft_pause_s=0.1),
    )
    for _ in range(story.troubles):
        asyncio.get_running_loop().call_later(story.span_s * chance.random(), world.trouble)
    count = chance.choice([1, 2, 3])
    world.outcomes += await asyncio.gather(*(_ask(world, router, n) for n in range(count)))
    await _settle(world)
    for outcome in world.outcomes:
        _judge(world, outcome)


async def _settle(world: World) -> None:
    """Once the network lets it, all is free at once; at the very end no task is left."""
    reachable_s = max(node.host.cut_until_s for node in world.nodes())
    await asyncio.sleep(max(0.0, reachable_s - asyncio.get_running_loop().time()) + FREED_S)
    for node in world.nodes():
        if node.host.up:
            _check_free(node)
    for peers in world.peers:
        await peers.close()
    await asyncio.sleep(SETTLED_S)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"


def _check_free(node: Node) -> None:
    replica = node.replica
    assert not replica.sessions, f"{replica.address} holds {replica.sessions} sessions"
    assert not len(replica.leases), f"{replica.address} holds {len(replica.leases)} leases"
    assert not replica.engine.fed, f"{replica.address} caches {replica.engine.fed}"
    assert not node.holds, f"{replica.address} is called"


def _judge(world: World, outcome: Outcome) -> None:
    got = tuple(outcome.got)
    assert got == outcome.wanted[: len(got)], f"wrote {got}, wanted {outcome.wanted}"
    if outcome.error is not None:
        clean = Unavailable | Overloaded | DeadlineExceeded
        assert isinstance(outcome.error, clean), outcome.error
        assert world.log, "an answer failed although nothing went wrong"
    elif not outcome.left:
        assert outcome.finished, "ended without a finish reason"
        assert got == outcome.wanted, f"wrote {got}, wanted {outcome.wanted}"


async def live(seed: int) -> World:
    """Live through one story; an assertion says what broke."""
    story = Story.of(seed)
    world = World(
        story=story,
        network=Network(story.chance, story.weather),
        leases={
            kind.name: SimLeases(kind, story.chance, most=story.most)
            for kind in (tiers.DRAFTER, tiers.EXPERT)
        },
    )
    try:
        async with asyncio.timeout(5_000):
            await _live(world)
    except BaseException as error:
        told: Any = "\n".join([f"seed {seed}: {story}", *world.log])
        error.add_note(told)
        raise
    return world
