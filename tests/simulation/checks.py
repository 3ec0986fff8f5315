"""What must hold in every scenario, whatever faults it has."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.simulation.cluster import Cluster, run_scenario
from tests.simulation.fake_replicas import first_wrong
from tests.simulation.scenario import Scenario
from tests.support.accounts import check_accounts

from cascade.errors import Overloaded, Unavailable
from cascade.router.router import RouterOptions
from cascade.types import DrafterLoss, Mode

if TYPE_CHECKING:
    from tests.simulation.cluster import Generation
    from tests.simulation.leases import Node

FREED_S = 2.0  # after the last generation, until both tiers are free
SETTLED_S = 60.0  # by when every timer has run out
MAX_S = 400.0  # of a scenario; no request may run into its last deadline
LATENCY_S = 1.5  # of what is not waiting for a replica: a lease, some rounds
OPTIONS = RouterOptions()


async def run_checked(seed: int) -> Cluster:
    """Run and check one scenario; notes of the AssertionError say what happened until then."""
    scenario = Scenario.of(seed)
    cluster = Cluster.of(scenario)
    try:
        async with asyncio.timeout(MAX_S):
            await run_scenario(cluster)
            await _settle(cluster)
        assert not cluster.violations, cluster.violations[0]
        for generation in cluster.generations:
            _check(cluster, generation)
    except BaseException as error:
        note: Any = "\n".join([f"seed {seed}: {scenario}", *cluster.log])
        error.add_note(note)
        raise
    return cluster


async def _settle(cluster: Cluster) -> None:
    """Check that all is freed once the network is not cut, and that no task is left."""
    loop = asyncio.get_running_loop()
    reachable_s = max(node.host.cut_until_s for node in cluster.nodes())
    await asyncio.sleep(max(0.0, reachable_s - loop.time()) + FREED_S)
    for node in cluster.nodes():
        if node.host.up:
            _check_free(node)
    for clients in cluster.clients:
        for client in clients._clients.values():  # pyright: ignore[reportPrivateUsage] - nothing else knows
            connection = client._connection  # pyright: ignore[reportPrivateUsage] - as above
            assert connection is None or not connection._sessions, f"{client.address} has sessions"  # pyright: ignore[reportPrivateUsage] - as above
        await clients.close()
    await asyncio.sleep(SETTLED_S)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"


def _check_free(node: Node) -> None:
    replica = node.replica
    assert not replica.num_sessions, f"{replica.address} holds {replica.num_sessions} sessions"
    assert not len(replica.leases), f"{replica.address} holds {len(replica.leases)} leases"
    assert not replica.engine.cache, f"{replica.address} caches {replica.engine.cache}"
    assert not node.holds, f"{replica.address} has open lease calls"


def _check(cluster: Cluster, generation: Generation) -> None:
    _check_text(generation)
    if generation.statistics is not None:
        origins = [origin for _, origin in generation.written]
        check_accounts(generation.request, generation.statistics, origins)
        waits = generation.request.on_drafter_loss is DrafterLoss.WAIT
        assert not (waits and generation.statistics.undrafted_rounds), "did not wait"
    if generation.error is not None:
        _check_error(cluster, generation, generation.error)
    elif not generation.left:
        assert generation.finished, "ended without a finish reason"
    if cluster.scenario.mild and generation.statistics is not None:
        _check_failovers(cluster, generation)


def _check_text(generation: Generation) -> None:
    request, written = generation.request, generation.written
    lost = generation.statistics is not None and generation.statistics.expert_losses > 0
    keeping = request.mode is Mode.DRAFTER_ONLY or lost
    wrong = first_wrong(request.prompt, written, keeping=keeping)
    assert wrong < 0, f"token {wrong} is not what its origin writes: {written}"
    tokens = [token for token, _ in written]
    stops = [i for i, token in enumerate(tokens) if token in request.policy.stop_ids]
    assert not stops or stops == [len(tokens) - 1], f"tokens after a stop token: {tokens}"
    assert len(tokens) <= request.max_tokens, f"too many tokens: {tokens}"
    if generation.finished:
        assert stops or len(tokens) == request.max_tokens, f"ended early: {tokens}"


def _check_error(cluster: Cluster, generation: Generation, error: Exception) -> None:
    """Check that a request failed only because a tier was unavailable for the whole deadline."""
    assert isinstance(error, Unavailable | Overloaded), f"{error!r}"
    scenario = cluster.scenario
    short_of_space = scenario.full_prob or scenario.max_leases < len(cluster.generations)
    if scenario.conditions.dropped or short_of_space:
        return
    begun = bool(generation.written)
    deadline_s = OPTIONS.loss_deadline_s if begun else OPTIONS.entry_deadline_s
    if generation.request.on_drafter_loss is DrafterLoss.WAIT:
        deadline_s = OPTIONS.draft_wait_s
    since_s = max(0.0, generation.ended_s - deadline_s + LATENCY_S)
    for name, leases in cluster.leases.items():
        if not begun and sum(bool(node.faults) for node in leases.nodes) > 1:
            continue  # two replicas that hang, one after the other, take all the time to begin
        there = [node for node in leases.nodes if node.usable(since_s, generation.ended_s)]
        failed = type(error).__name__.lower().startswith(name)
        assert not failed or not there, f"failed while {there[0].replica.address} was there"


def _check_failovers(cluster: Cluster, generation: Generation) -> None:
    """Check that each fault causes at most one failover, and nothing else causes one."""
    assert generation.statistics is not None
    causes = generation.statistics.failover_causes
    failovers = sum(count for cause, count in causes.items() if not cause.endswith("late"))
    assert failovers <= len(cluster.scenario.faults), f"needless failovers: {causes}"
