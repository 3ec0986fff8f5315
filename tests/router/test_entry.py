"""How long a new request looks for the tiers that it needs, in virtual time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.simulation.clock import run
from tests.support.fake_tier import FakeTier, drafting, judgement, silent

from cascade.errors import CascadeError, DrafterUnavailable, ExpertUnavailable, Overloaded
from cascade.protocol import services
from cascade.protocol.messages import Judge
from cascade.router.leases import HedgedLeases
from cascade.router.router import Router, RouterOptions
from cascade.speculation.draft_length import Fixed
from cascade.types import Caller, DecodingParams, Mode, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.fake_tier import FakeStream

OPTIONS = RouterOptions()
LITTLE_S = 0.5  # beyond the deadline: the last look at a silent replica, and a pause


def judging(message: object, stream: FakeStream) -> Sequence[object]:
    """Write one token."""
    del stream
    return [judgement(message, 5)] if isinstance(message, Judge) else []


def well(tier: FakeTier) -> None:
    """Leave the tier as it is."""
    del tier


def absent(tier: FakeTier) -> None:
    """Never grant a lease: no replica runs."""
    tier.leases.gate = asyncio.Event()


def refused(tier: FakeTier) -> None:
    """Answer every request for a lease with an error."""
    tier.leases.errors = [tier.kind.unavailable("nobody")] * 100


def unreachable(tier: FakeTier) -> None:
    """Grant leases on replicas whose addresses swallow everything."""
    tier.clients.reply, tier.clients.silent = silent, True


def full(tier: FakeTier) -> None:
    """Never grant a lease though a replica is connected."""
    absent(tier)
    tier.clients.connected = [object()]


def failure(mode: Mode, *, drafters: Any, experts: Any, score: bool = False) -> tuple[Any, float]:
    """Return the error of a new request, and after how many seconds it came."""

    async def ask() -> tuple[Any, float]:
        tiers = [FakeTier(drafting(7, 8)), FakeTier(judging, kind=services.EXPERT)]
        clients: list[Any] = []
        for tier, fault in zip(tiers, (drafters, experts), strict=True):
            client = tier.client
            fault(tier)
            clients.append(client)
            source: Any = tier.leases
            client.leases._source = HedgedLeases(source, after_s=OPTIONS.lease_hedge_s)  # pyright: ignore[reportPrivateUsage] - as under Ray
        router = Router(
            drafters=clients[0],
            experts=clients[1],
            automatic=lambda _: Fixed(tokens=2, reason="test"),
            options=OPTIONS,
        )
        try:
            if score:
                await router.score((1, 2, 3), top=0, caller=Caller())
            else:
                request = Request(prompt=(1,), policy=DecodingParams(), mode=mode, max_tokens=4)
                async for _ in router.generate(request):
                    pass
        except CascadeError as error:
            return error, asyncio.get_running_loop().time()
        return None, asyncio.get_running_loop().time()

    return run(ask())


@pytest.mark.parametrize("experts", [absent, refused, unreachable])
@pytest.mark.parametrize("drafters", [well, absent, refused, unreachable])
@pytest.mark.parametrize("mode", [Mode.CASCADE, Mode.SPECULATIVE, Mode.EXPERT_ONLY])
def test_without_an_expert_a_new_request_fails_at_the_entry_deadline(
    mode: Mode, drafters: Any, experts: Any
) -> None:
    """Wherever it waits, and whatever the drafters do meanwhile."""
    error, waited_s = failure(mode, drafters=drafters, experts=experts)
    assert isinstance(error, ExpertUnavailable)
    late = drafters is unreachable and mode is not Mode.EXPERT_ONLY
    extra_s = OPTIONS.draft_deadline_s if late and experts is unreachable else 0.0
    assert waited_s <= OPTIONS.entry_deadline_s + LITTLE_S + extra_s
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 1


@pytest.mark.parametrize("drafters", [absent, refused, unreachable])
@pytest.mark.parametrize("mode", [Mode.DRAFTER_ONLY, Mode.TOKEN_CASCADE, Mode.SEQUENCE_CASCADE])
def test_without_a_drafter_that_it_needs_too(mode: Mode, drafters: Any) -> None:
    error, waited_s = failure(mode, drafters=drafters, experts=well)
    assert isinstance(error, DrafterUnavailable)
    assert waited_s <= OPTIONS.entry_deadline_s + LITTLE_S


@pytest.mark.parametrize("experts", [absent, refused, unreachable])
def test_scoring_a_prompt_waits_no_longer(experts: Any) -> None:
    error, waited_s = failure(Mode.CASCADE, drafters=well, experts=experts, score=True)
    assert isinstance(error, ExpertUnavailable)
    assert waited_s <= OPTIONS.entry_deadline_s + LITTLE_S


def test_a_tier_that_is_full_is_queued_for() -> None:
    """That is no outage: the request waits for a slot, and is told to come back."""
    error, waited_s = failure(Mode.CASCADE, drafters=well, experts=full)
    assert isinstance(error, Overloaded)
    assert waited_s == pytest.approx(OPTIONS.lease_timeout_s)
