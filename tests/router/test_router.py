"""The loop on real tiers over gRPC: every mode against its slow twin, and faults."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from tests import reference
from tests.conftest import AlwaysClosed
from tests.support.accounts import check_accounts

from cascade.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DrafterUnavailable,
    ExpertUnavailable,
)
from cascade.local import LocalServer, local_server
from cascade.rules import (
    Bild,
    Chow,
    ChowLog,
    Diff,
    Ensemble,
    Lossy,
    Opt,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    DrafterLoss,
    ExpertLoss,
    FinishReason,
    Mode,
    Origin,
    OutputChunk,
    Request,
    RowFormat,
    SamplingParams,
    SequenceCascadeParams,
    TokenConstraints,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Pair

PROMPT: tuple[int, ...] = (3, 1, 4, 1, 5)

DEFAULTS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 10, "draft_tokens": 3}

MODES: dict[str, dict[str, Any]] = {
    "expert_only": {"mode": Mode.EXPERT_ONLY},
    "drafter_only": {"mode": Mode.DRAFTER_ONLY},
    "token_cascade": {"mode": Mode.TOKEN_CASCADE, "policy": DecodingParams(rule=Chow(alpha=0.6))},
    "patient": {"mode": Mode.SEQUENCE_CASCADE, "patience": SequenceCascadeParams(threshold=-9)},
    "impatient": {
        "mode": Mode.SEQUENCE_CASCADE,
        "patience": SequenceCascadeParams(threshold=-0.01),
    },
    "speculative": {"mode": Mode.SPECULATIVE},
    "lossy": {
        "mode": Mode.SPECULATIVE,
        "policy": DecodingParams(rule=Lossy(alpha=0.3, beta="solved")),
    },
} | {
    type(rule).__name__: {"policy": DecodingParams(rule=rule)}
    for rule in (
        Chow(alpha=0.6),
        ChowLog(alpha=1.0),
        Diff(alpha=0.1),
        Opt(alpha=0.2),
        Bild(alpha=1.0),
        Ensemble(weight=0.6),
        TokenV1(alpha=0.3),
        TokenV2(alpha=0.3),
        TokenV3(alpha=0.6),
        Typical(),
    )
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gumbel": {"coupling": Coupling.GUMBEL},
    "no bonus": {"bonus": Bonus.NONE},
    "bonus of the target": {"bonus": Bonus.TARGET, "rows": RowFormat.FULL},
    "block": {"verification": Verification.BLOCK},
    "greedy": {"sampling": SamplingParams(temperature=0.0)},
    "penalties": {
        "sampling": SamplingParams(
            temperature=0.8,
            top_k=6,
            top_p=0.95,
            presence_penalty=0.5,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            logit_bias=((2, 1.5),),
        )
    },
    "masked": {
        "constraints": TokenConstraints(min_tokens=4, bad_words=((1,), (2, 3), (5, 5, 5))),
        "stop_ids": (6,),
    },
}


async def answer(server: LocalServer, request: Request) -> list[OutputChunk]:
    return [piece async for piece in server.router.generate(request)]


def origins(pieces: list[OutputChunk]) -> list[tuple[int, Origin]]:
    return [pair for piece in pieces for pair in zip(piece.tokens, piece.origins, strict=True)]


TWINS = [
    # Every mode as it is, and each variant of every other one; all in the slow suite.
    pytest.param(
        MODES[mode],
        VARIANTS[variant],
        id=f"{mode}-{variant}",
        marks=[pytest.mark.slow] if j and (i + j) % 2 else [],
    )
    for i, mode in enumerate(MODES)
    for j, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("how", "variant"), TWINS)
async def test_every_mode_writes_what_its_slow_twin_writes(
    toy: Pair, toy_stack: LocalServer, how: dict[str, Any], variant: dict[str, Any]
) -> None:
    """No cache, batch or wire changes a token, nor who wrote it."""
    for seed in (7,):
        policy = replace(how.get("policy", DecodingParams()), **variant, seed=seed)
        request = replace(Request(**(DEFAULTS | how | {"policy": policy})), trace=True)
        twin = reference.decode(
            PROMPT,
            drafter=toy.drafter.logits,
            expert=toy.expert.logits,
            policy=policy,
            mode=request.mode,
            draft_tokens=3,
            max_tokens=10,
            patience=request.patience,
        )
        pieces = await answer(toy_stack, request)
        assert origins(pieces) == twin
        assert pieces[-1].statistics is not None
        check_accounts(request, pieces[-1].statistics, [origin for _, origin in twin])
        assert pieces[-1].statistics.undrafted_rounds == {}


def tokens(pieces: list[OutputChunk]) -> tuple[int, ...]:
    return tuple(token for piece in pieces for token in piece.tokens)


def greedy(length: int = 60, **more: Any) -> Request:
    defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "draft_tokens": 3}
    policy = DecodingParams(sampling=SamplingParams(temperature=0.0))
    return Request(prompt=PROMPT, policy=policy, max_tokens=length, **(defaults | more))


def alone(pair: Pair, length: int = 60) -> tuple[int, ...]:
    """Return the expert's own greedy answer, from plain forward passes."""
    text = list(PROMPT)
    for _ in range(length):
        text.append(int(pair.expert.logits(text).argmax()))
    return tuple(text[len(PROMPT) :])


@pytest.fixture
async def fragile(toy: Pair) -> AsyncIterator[LocalServer]:
    """A server of one's own, to be broken; a lost drafter is tried again at once."""
    settings = toy.settings(router={"draft_pause_s": 1e-9, "draft_deadline_s": 60})
    async with local_server(settings) as running:
        yield running


async def test_an_answer_reports_what_it_cost(toy_stack: LocalServer) -> None:
    pieces = await answer(toy_stack, greedy(20, trace=True))
    last = pieces[-1]
    entry = last.statistics
    assert last.finish is FinishReason.LENGTH
    assert entry is not None
    assert entry.drafter_tokens + entry.kept_tokens + entry.expert_tokens == 20
    assert entry.accepted == entry.drafter_tokens + entry.kept_tokens <= entry.drafted
    assert entry.rounds == len(entry.trace) == len(pieces) == entry.expert_passes
    assert sum(entry.accepted_lengths) == sum(bool(one.drafted) for one in entry.trace)
    assert sum(one.tokens for one in entry.trace) == 20
    assert min(entry.sent_bytes, entry.received_bytes) > 0
    assert all(piece.statistics is pieces[-1].statistics for piece in pieces)


async def test_the_next_block_is_asked_for_before_a_piece_is_read(toy: Pair) -> None:
    """A reader that takes its time keeps nobody from drafting."""
    settings = toy.settings(router={"overlap_blocks": 0, "overlap_branches": 0})
    async with local_server(settings) as running:
        async with aclosing(running.router.generate(greedy())) as pieces:
            await anext(pieces)
            before = running.drafter.engine.stats().passes
            async with asyncio.timeout(10):
                while running.drafter.engine.stats().passes < before + 3:  # noqa: ASYNC110 - untold
                    await asyncio.sleep(0)
            text = [piece async for piece in pieces]
        passes = running.drafter.engine.stats().passes
        assert text[-1].statistics is not None
        assert text[-1].statistics.drafter_passes <= passes <= before + 3 * len(text)


async def test_a_stop_token_ends_the_answer(toy: Pair, toy_stack: LocalServer) -> None:
    """Nothing after it is committed, though the block went on."""
    text = alone(toy, 30)
    stop = text[10]
    first = text.index(stop)
    request = greedy(30, draft_tokens=8)
    request = replace(request, policy=replace(request.policy, stop_ids=(stop,)))
    pieces = await answer(toy_stack, request)
    assert tokens(pieces) == text[: first + 1]
    assert pieces[-1].finish is FinishReason.STOP


async def test_a_drafter_that_dies_costs_no_token(toy: Pair, fragile: LocalServer) -> None:
    """The expert goes on alone; what was drafted before was really drafted."""
    pieces = list[OutputChunk]()
    async for piece in fragile.router.generate(greedy(trace=True)):
        pieces.append(piece)
        if len(pieces) == 3:
            await fragile.drafter.stop()
    entry = pieces[-1].statistics
    assert tokens(pieces) == alone(toy)
    assert entry is not None
    drafted = [one.drafted for one in entry.trace]
    assert all(drafted[:3])
    assert not any(drafted[4:])
    assert set(entry.failover_causes) == {"drafter lost"}
    assert set(entry.undrafted_rounds) == {"lost"}
    assert all(one.drafted or one.undrafted == "lost" for one in entry.trace[:-1])


KEEP = TokenV3(alpha=0.9)  # keeps so much of the drafter that its loss changes the text


def kept(**more: Any) -> Request:
    request = greedy(40, mode=Mode.CASCADE, trace=True, **more)
    return replace(request, policy=replace(request.policy, rule=KEEP))


async def test_an_answer_that_waits_for_its_drafter_has_the_same_text_whatever_dies(
    toy: Pair, fragile: LocalServer
) -> None:
    """Without it the expert writes on, which changes the text, and says in how many rounds."""
    from cascade.drafter.drafter import Drafter  # noqa: PLC0415 - one test needs it

    undisturbed = tokens(await answer(fragile, kept()))
    texts: dict[DrafterLoss, tuple[int, ...]] = {}
    for choice in (DrafterLoss.WAIT, DrafterLoss.EXPERT):
        pieces = list[OutputChunk]()
        reborn: Drafter | None = None
        async for piece in fragile.router.generate(kept(on_drafter_loss=choice)):
            pieces.append(piece)
            if len(pieces) == 2:
                await fragile.drafter.stop()
                if choice is DrafterLoss.WAIT:
                    address, token = fragile.drafter.address, fragile.token
                    reborn = await Drafter.start(
                        toy.settings().drafter.options(), address=address, token=token
                    )
        entry = pieces[-1].statistics
        assert entry is not None
        check_accounts(kept(), entry, [origin for _, origin in origins(pieces)])
        texts[choice] = tokens(pieces)
        if reborn is not None:
            assert (entry.undrafted_rounds, bool(entry.failovers)) == ({}, True)
            await reborn.stop()
    assert texts[DrafterLoss.WAIT] == undisturbed
    assert texts[DrafterLoss.EXPERT] != undisturbed
    assert set(entry.undrafted_rounds) == {"lost"}


async def test_the_expert_goes_on_where_an_answer_outgrows_the_drafter(toy: Pair) -> None:
    """Whoever waits for a drafter is refused there instead."""
    engine = {"threads": 1, "cache_tokens": 32}
    drafter = {"model": str(toy.drafter.path), "engine": engine}
    settings = toy.settings(drafter=drafter, router={"draft_deadline_s": 60})
    with mock.patch("cascade.router.router.CircuitBreaker", AlwaysClosed):
        async with local_server(settings) as running:
            holds = running.drafter.describe().context_length
            request = greedy(holds + 30, trace=True)
            pieces = await answer(running, request)
            waits = replace(request, prompt=(1,) * holds, on_drafter_loss=DrafterLoss.WAIT)
            with pytest.raises(ContextTooLong, match="on_drafter_loss"):
                await answer(running, waits)
    entry = pieces[-1].statistics
    assert tokens(pieces) == alone(toy, holds + 30)
    assert entry is not None
    check_accounts(request, entry, [origin for _, origin in origins(pieces)])
    assert set(entry.undrafted_rounds) == {"context"}
    assert all(one.drafted for one in entry.trace if one.position < holds - 20)


@pytest.mark.parametrize("limits", [{"draft_wait_s": 0.1}, {}], ids=["setting", "request"])
async def test_an_answer_that_waits_for_no_drafter_at_all_may_be_repeated(
    toy: Pair, limits: dict[str, float]
) -> None:
    """The setting ends the wait, or the request's own deadline."""
    async with local_server(toy.settings(router=limits)) as running:
        await running.drafter.stop()
        deadline_s = None if limits else 0.2
        request = kept(on_drafter_loss=DrafterLoss.WAIT, deadline_s=deadline_s)
        with pytest.raises(DrafterUnavailable, match="on_drafter_loss") as found:
            await answer(running, request)
        assert (found.value.http, found.value.grpc) == (503, "UNAVAILABLE")
        with pytest.raises(DeadlineExceeded):
            await answer(running, replace(greedy(), mode=Mode.EXPERT_ONLY, deadline_s=1e-6))
        assert len(await answer(running, kept())) > 0


@pytest.mark.parametrize("mode", [Mode.DRAFTER_ONLY, Mode.SEQUENCE_CASCADE])
async def test_a_prediction_is_no_answer_where_nobody_verifies_it(
    toy_stack: LocalServer, mode: Mode
) -> None:
    patience = SequenceCascadeParams(threshold=-99)
    plain = await answer(toy_stack, greedy(20, mode=mode, patience=patience))
    false = tuple((token + 1) % 8 for token in tokens(plain))
    request = greedy(20, mode=mode, patience=patience, prediction=false)
    assert tokens(await answer(toy_stack, request)) == tokens(plain)


async def test_speculation_comes_back_with_the_drafter(toy: Pair, fragile: LocalServer) -> None:
    from cascade.drafter.drafter import Drafter  # noqa: PLC0415 - one test needs it

    pieces = list[OutputChunk]()
    reborn: Drafter | None = None
    async for piece in fragile.router.generate(greedy(80, trace=True)):
        pieces.append(piece)
        if len(pieces) == 3:
            await fragile.drafter.stop()
        if len(pieces) == 6:
            reborn = await Drafter.start(
                toy.settings().drafter.options(),
                address=fragile.drafter.address,
                token=fragile.token,
            )
    assert reborn is not None
    await reborn.stop()
    entry = pieces[-1].statistics
    assert tokens(pieces) == alone(toy, 80)
    assert entry is not None
    assert any(one.drafted for one in entry.trace[6:])


async def test_an_expert_that_dies_is_replaced_mid_answer(toy: Pair, fragile: LocalServer) -> None:
    """The session moves to another replica with all that is committed."""
    from cascade.expert.expert import Expert  # noqa: PLC0415 - one test needs it

    pieces = list[OutputChunk]()
    reborn: Expert | None = None
    async for piece in fragile.router.generate(greedy()):
        pieces.append(piece)
        if len(pieces) == 4:
            await fragile.expert.stop()
            reborn = await Expert.start(
                toy.settings().expert.options(),
                address=fragile.expert.address,
                token=fragile.token,
            )
    assert reborn is not None
    await reborn.stop()
    entry = pieces[-1].statistics
    assert tokens(pieces) == alone(toy)
    assert entry is not None
    assert entry.failovers >= 1
    assert entry.failover_causes.get("expert lost", 0) == entry.failovers


async def test_the_drafter_ends_an_answer_that_no_expert_is_left_for(toy: Pair) -> None:
    """Where the client wishes so; and the answer says it."""
    settings = toy.settings(router={"loss_deadline_s": 0.1, "draft_deadline_s": 60})
    async with local_server(settings) as running:
        pieces = list[OutputChunk]()
        async for piece in running.router.generate(greedy(on_expert_loss=ExpertLoss.DRAFTER)):
            pieces.append(piece)
            if len(pieces) == 3:
                await running.expert.stop()
    written, entry = tokens(pieces), pieces[-1].statistics
    judged = sum(len(piece.tokens) for piece in pieces[:3])
    text = [*PROMPT, *written[:judged]]
    while len(text) < len(PROMPT) + 60:
        text.append(int(toy.drafter.logits(text).argmax()))
    assert written[:judged] == alone(toy)[:judged]
    assert written == tuple(text[len(PROMPT) :])
    assert entry is not None
    assert (entry.expert_losses, pieces[-1].finish) == (1, FinishReason.LENGTH)


async def test_no_expert_at_all_is_a_clean_error(fragile: LocalServer) -> None:
    await fragile.expert.stop()
    with pytest.raises(ExpertUnavailable):
        await answer(fragile, greedy())


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_caller_that_leaves_frees_both_tiers(fragile: LocalServer, mode: Mode) -> None:
    request = greedy(200, mode=mode)
    async with aclosing(fragile.router.generate(request)) as pieces:
        async for _ in pieces:
            break
    async with asyncio.timeout(10):
        while fragile.drafter.num_sessions or fragile.expert.num_sessions:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0)
    assert len(fragile.expert.leases) == 0


async def test_a_deadline_ends_the_answer(toy_stack: LocalServer) -> None:
    with pytest.raises(DeadlineExceeded):
        await answer(toy_stack, greedy(deadline_s=0.0))


async def test_a_prompt_longer_than_the_context_is_refused(toy_stack: LocalServer) -> None:
    request = replace(greedy(), prompt=(1,) * 600)
    with pytest.raises(ContextTooLong, match="512"):
        await answer(toy_stack, request)


async def test_a_prediction_that_comes_true_saves_rounds(toy: Pair, toy_stack: LocalServer) -> None:
    text = alone(toy, 40)
    pieces = await answer(toy_stack, greedy(40, prediction=text, draft_tokens=8))
    assert tokens(pieces) == text
    assert len(pieces) == 5
    entry = pieces[-1].statistics
    assert entry is not None
    assert (entry.predicted_accepted, entry.predicted_rejected) == (35, 0)


async def test_a_false_prediction_changes_nothing(toy: Pair, toy_stack: LocalServer) -> None:
    text = alone(toy, 40)
    false = tuple((token + 1) % 8 for token in text)
    pieces = await answer(toy_stack, greedy(40, prediction=false))
    assert tokens(pieces) == text


async def test_scores_are_the_experts_log_probabilities(toy: Pair, toy_stack: LocalServer) -> None:
    text = (*PROMPT, 2, 6, 5)
    scores = await toy_stack.router.score(text, top=3)
    assert [one.token for one in scores] == list(text[1:])
    for index, one in enumerate(scores, start=1):
        row = toy.expert.logits(text[:index]).log_softmax(0)
        assert one.logprob == pytest.approx(float(row[text[index]]), abs=1e-4)
        assert [token for token, _ in one.top] == row.topk(3).indices.tolist()
