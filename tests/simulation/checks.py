"""What must hold of every story, whatever went wrong in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.simulation.story import Story
from tests.simulation.toys import unlawful
from tests.simulation.world import World, happen

from cascade.errors import Overloaded, Unavailable
from cascade.router.router import RouterOptions
from cascade.types import Mode

if TYPE_CHECKING:
    from tests.simulation.leases import Node
    from tests.simulation.world import Outcome

FREED_S = 2.0  # after the last answer, until both tiers are free
SETTLED_S = 60.0  # by when every timer has run out
LONGEST_S = 400.0  # of a story; no answer may wait for its last deadline
LATENCY_S = 1.5  # of what is not waiting: a lease, some rounds
OPTIONS = RouterOptions()


async def live(seed: int) -> World:
    """Live through one story; an assertion says what broke, and its notes how it came to that."""
    story = Story.of(seed)
    world = World.of(story)
    try:
        async with asyncio.timeout(LONGEST_S):
            await happen(world)
            await _settle(world)
        assert not world.broken, world.broken[0]
        for outcome in world.outcomes:
            _judge(world, outcome)
    except BaseException as error:
        told: Any = "\n".join([f"seed {seed}: {story}", *world.log])
        error.add_note(told)
        raise
    return world


async def _settle(world: World) -> None:
    """Once the network lets it, all is free at once; at the very end no task is left."""
    loop = asyncio.get_running_loop()
    reachable_s = max(node.host.cut_until_s for node in world.nodes())
    await asyncio.sleep(max(0.0, reachable_s - loop.time()) + FREED_S)
    for node in world.nodes():
        if node.host.up:
            _check_free(node)
    for peers in world.peers:
        for peer in peers._peers.values():  # pyright: ignore[reportPrivateUsage] - nobody else knows
            assert peer._stream is None or not peer._stream._links, f"{peer.address} is linked"  # pyright: ignore[reportPrivateUsage] - as above
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
    _check_text(outcome)
    if outcome.error is not None:
        _check_error(world, outcome, outcome.error)
    elif not outcome.left:
        assert outcome.finished, "ended without a finish reason"
    if world.story.mild and outcome.statistics is not None:
        _check_moves(world, outcome)


def _check_text(outcome: Outcome) -> None:
    request, written = outcome.request, outcome.written
    lost = outcome.statistics is not None and outcome.statistics.expert_losses > 0
    keeping = request.mode is Mode.DRAFTER_ONLY or lost
    wrong = unlawful(request.prompt, written, keeping=keeping)
    assert wrong < 0, f"token {wrong} is not what its origin writes: {written}"
    tokens = [token for token, _ in written]
    stops = [place for place, token in enumerate(tokens) if token in request.policy.stop_ids]
    assert not stops or stops == [len(tokens) - 1], f"wrote on after the end: {tokens}"
    assert len(tokens) <= request.max_tokens, f"wrote too much: {tokens}"
    if outcome.finished:
        assert stops or len(tokens) == request.max_tokens, f"ended early: {tokens}"


def _check_error(world: World, outcome: Outcome, error: Exception) -> None:
    """An answer fails only where its tier could not serve it, for as long as it must bear that."""
    assert isinstance(error, Unavailable | Overloaded), f"{error!r}"
    if world.story.weather.dropped or world.story.full or world.story.most < len(world.outcomes):
        return
    begun = bool(outcome.written)
    bears_s = OPTIONS.loss_deadline_s if begun else OPTIONS.entry_deadline_s
    since_s = max(0.0, outcome.ended_s - bears_s + LATENCY_S)
    for name, leases in world.leases.items():
        there = [node for node in leases.nodes if node.usable(since_s, outcome.ended_s)]
        failed = type(error).__name__.lower().startswith(name)
        assert not failed or not there, f"failed while {there[0].replica.address} was there"


def _check_moves(world: World, outcome: Outcome) -> None:
    """Nothing but a trouble makes a session move, and each but once."""
    assert outcome.statistics is not None
    causes = outcome.statistics.failover_causes
    moves = sum(count for cause, count in causes.items() if not cause.endswith("late"))
    assert moves <= len(world.story.troubles), f"moved without need: {causes}"
