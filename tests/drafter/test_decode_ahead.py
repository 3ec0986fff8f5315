"""Drafting without a plan between passes sends what drafting token by token sends."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.engine.architectures import VOCABULARY, build
from tests.support.fake_engine import TOKEN, Client
from torch import nn

from cascade.drafter.drafter import Drafter
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.batch import Segment
from cascade.engine.model_loader import adopt
from cascade.engine.settings import EngineSettings, Path
from cascade.protocol.messages import Proposal, Propose
from cascade.replica.options import ReplicaOptions
from cascade.rules import Chow, ChowLog, TokenV1
from cascade.speculation.draft import DraftTask, draw
from cascade.speculation.payload import needs_probs_after_block
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

if TYPE_CHECKING:
    from torch import Tensor

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
SAMPLED = DecodingParams(seed=11)
POLICIES = {
    "greedy": GREEDY,
    "greedy with log-probabilities": replace(GREEDY, logprobs=2),
    "sampled": SAMPLED,
    "truncated": replace(
        SAMPLED, sampling=SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01)
    ),
    "biased": replace(SAMPLED, sampling=SamplingParams(logit_bias=((5, 3.0), (9, -100.0)))),
    "whole distributions": replace(SAMPLED, rows=RowFormat.FULL),
    "cut by what is lost": replace(SAMPLED, rule=TokenV1(alpha=0.3), rows=RowFormat.SPARSE),
    "block by block": replace(SAMPLED, verification=Verification.BLOCK),
    "shared noise": replace(SAMPLED, coupling=Coupling.GUMBEL),
    "with the distribution after the block": replace(
        SAMPLED, rule=ChowLog(alpha=2.0), bonus=Bonus.TARGET
    ),
}
PATHS = [Path.CAPTURED, Path.FLAT, Path.LEAN]
COUNTS = (5, 5, 3)  # tokens of each session's block


def drafter(path: Path, *, ahead: bool, reads_each: bool = False, device: str = "cpu") -> Drafter:
    """Return a drafter whose engine a test steps; it reads each pass as on a CPU, or none."""
    tokenizer: Any = SimpleNamespace(size=VOCABULARY, tokens={})
    settings = EngineSettings(path=path, threads=1, cache_tokens=2048)
    options = ReplicaOptions(model="tiny", engine=settings)
    model = build("llama")
    nn.Module.to(model, device)
    found = Drafter(adopt(model), tokenizer, options, token=TOKEN)
    assert found.engine.decodes_ahead
    assert found.engine.reads_each == (device == "cpu")
    found.engine.decodes_ahead, found.engine.reads_each = ahead, reads_each
    return found


async def finished(replica: Drafter) -> int:
    """Step the engine until nothing waits; return how many steps it took."""
    steps = 0
    await asyncio.sleep(0)  # the event loop delivers results, and what they were waited for
    while replica.engine.stats().waiting:
        replica.engine.step()
        steps += 1
        await asyncio.sleep(0)
    return steps


async def proposals(
    replica: Drafter, policy: DecodingParams, *, rounds: int = 2, **more: Any
) -> list[list[tuple[Any, ...]]]:
    """Return what several sessions are sent, comparable, when each accepts its first drafts."""
    clients = [
        Client(
            replica,  # pyright: ignore[reportArgumentType] - it serves messages as a fake one does
            name=name,
            prompt=tuple(range(3 + i, 20 + 7 * i)),
            policy=replace(policy, seed=policy.seed + i),
        )
        for i, name in enumerate("abc")
    ]
    await finished(replica)
    sent: list[list[tuple[Any, ...]]] = [[] for _ in clients]
    committed: list[list[int]] = [[] for _ in clients]
    for _ in range(rounds):
        for client, tokens, count in zip(clients, committed, COUNTS, strict=True):
            message = Propose(**client.after(*tokens), count=count, tokens=tuple(tokens), **more)
            client.send(message)
        await finished(replica)
        for client, tokens, messages in zip(clients, committed, sent, strict=True):
            blocks = [one for one in await client.take() if isinstance(one, Proposal)]
            messages.extend(map(comparable, blocks))
            if blocks:  # two drafts are accepted, and another token follows
                tokens += [*blocks[0].block.tokens[:2], 7]
    return sent


def comparable(proposal: Proposal) -> tuple[Any, ...]:
    block = proposal.block
    return (
        *(proposal.position, proposal.deferred, proposal.branched, proposal.passes),
        *(block.tokens, block.likelihoods, block.unscaled, block.draft_stats, block.logprobs),
        [
            (one.ids.tolist(), one.weights.tolist(), np.asarray(one.unscaled).tolist())
            for one in block.draft_probs
        ],
    )


def passes(replica: Drafter) -> int:
    return replica.engine.stats().passes


def counting(replica: Drafter) -> list[int]:
    """Return a list that gets how many passes each run without a plan between them had."""
    counts: list[int] = []
    decode_ahead = replica.engine.decode_ahead

    def counted(*args: Any, **more: Any) -> Any:
        found = decode_ahead(*args, **more)
        counts.append(len(found[0]))
        return found

    replica.engine.decode_ahead = counted
    return counts


either_manner = pytest.mark.parametrize("reads_each", [False, True], ids=["unread", "read"])


def both(path: Path, *, reads_each: bool) -> list[Drafter]:
    """Return a drafter that plans each pass, and one that does not."""
    return [drafter(path, ahead=ahead, reads_each=reads_each) for ahead in (False, True)]


@either_manner
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
async def test_blocks_are_those_drafted_token_by_token(
    policy: DecodingParams, *, reads_each: bool
) -> None:
    by_token, ahead = both(Path.CAPTURED, reads_each=reads_each)
    expected, runs = await proposals(by_token, policy, ahead=1), counting(ahead)
    assert await proposals(ahead, policy, ahead=1) == expected
    assert max(runs) >= 2
    for messages, count in zip(expected, COUNTS, strict=True):
        assert len(messages) >= 2
        assert len(messages[0][4]) == count
        extra = needs_probs_after_block(policy)
        assert len(messages[0][-1]) in {0, count + extra}


@either_manner
@pytest.mark.parametrize("path", PATHS)
async def test_every_path_runs_tokens_of_the_device(path: Path, *, reads_each: bool) -> None:
    by_token, ahead = both(path, reads_each=reads_each)
    runs = counting(ahead)
    assert await proposals(ahead, SAMPLED, ahead=1) == await proposals(by_token, SAMPLED, ahead=1)
    assert max(runs) >= 2


@either_manner
async def test_a_block_takes_one_step_of_the_engine(*, reads_each: bool) -> None:
    replica = drafter(Path.CAPTURED, ahead=True, reads_each=reads_each)
    client = Client(replica, name="a", prompt=(3, 4, 5), policy=GREEDY)  # pyright: ignore[reportArgumentType] - as above
    await finished(replica)
    before = passes(replica)
    client.send(Propose(**client.after(), count=5))
    assert await finished(replica) == 1
    (block,) = await client.take()
    assert isinstance(block, Proposal)
    assert block.block.length == block.passes == passes(replica) - before == 5


@either_manner
async def test_blocks_that_end_early_and_side_branches_are_the_same(
    monkeypatch: pytest.MonkeyPatch, *, reads_each: bool
) -> None:
    """At a stop token, at a deferral, at low confidence; and drafts of other verdicts."""
    monkeypatch.setattr("cascade.drafter.drafter.MAX_BRANCH_OVERHEAD", 1e9)
    monkeypatch.setattr("cascade.engine.engine.Engine.spare", 1.0)
    greedy_tokens = (await proposals(drafter(Path.CAPTURED, ahead=False), GREEDY))[0][0][4]
    cases: list[tuple[DecodingParams, dict[str, Any]]] = [
        (replace(GREEDY, stop_ids=(greedy_tokens[2],)), {"ahead": 1}),
        (replace(SAMPLED, rule=Chow(alpha=0.5), bonus=Bonus.NONE), {"until_deferral": True}),
        (SAMPLED, {"floor": 1e-6, "ahead": 2}),
        (SAMPLED, {"branches": 3, "ahead": 1}),
        (GREEDY, {"branches": 4, "floor": 0.01}),
    ]
    for policy, more in cases:
        by_token, ahead = both(Path.CAPTURED, reads_each=reads_each)
        expected, runs = await proposals(by_token, policy, **more), counting(ahead)
        found = await proposals(ahead, policy, **more)
        if reads_each:
            tokens, expected_tokens = (one.engine.stats().tokens for one in (ahead, by_token))
            assert tokens == expected_tokens, "none ran in vain"
        else:
            may_end = "floor" in more or "until_deferral" in more
            assert (max(runs) == 2) == may_end, more
        for one, other in zip(found, expected, strict=True):
            assert sorted(one, key=repr) == sorted(other, key=repr), more


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(repetition_penalty=1.3), SamplingParams(temperature=0, frequency_penalty=0.5)],
)
async def test_penalties_are_drafted_token_by_token(
    sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count tokens, which only the host has."""
    monkeypatch.setattr("cascade.engine.engine.Engine.decode_ahead", None)
    policy = replace(SAMPLED, sampling=sampling)
    by_token, ahead = (drafter(Path.CAPTURED, ahead=ahead) for ahead in (False, True))
    assert await proposals(ahead, policy) == await proposals(by_token, policy)
    assert ahead.engine.decodes_ahead


async def test_a_message_ends_a_run_that_is_read() -> None:
    """A verdict that comes while blocks are drafted ahead of it waits for one pass."""
    replica = drafter(Path.LEAN, ahead=True, reads_each=True)
    client = Client(replica, name="a", prompt=(3, 4, 5), policy=GREEDY)  # pyright: ignore[reportArgumentType] - as above
    await finished(replica)
    decode, runs = replica.engine.runner.decode, counting(replica)

    def with_verdict(segments: Any, ids_N: Tensor) -> Tensor:
        if client.received or replica.engine.stats().passes > 5:
            client.send(Propose(**client.after(7), count=2, tokens=(7,)))
            replica.engine.runner.decode = decode
        return decode(segments, ids_N)

    replica.engine.runner.decode = with_verdict
    client.send(Propose(**client.after(), count=5, ahead=1))
    await finished(replica)
    messages = [one for one in await client.take() if isinstance(one, Proposal)]
    assert [(one.position, one.block.length) for one in messages] == [(0, 5), (1, 2)]
    assert runs[:2] == [4, 1]


async def test_invalid_logits_in_a_run_that_is_read_leave_the_session_as_it_was() -> None:
    by_token, ahead = both(Path.LEAN, reads_each=True)
    decode, calls = ahead.engine.runner.decode, 0

    def invalid_once(segments: Any, ids_N: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return decode(segments, ids_N) * (math.nan if calls == 2 else 1)

    ahead.engine.runner.decode = invalid_once
    assert await proposals(ahead, SAMPLED) == await proposals(by_token, SAMPLED)
    assert calls > 2
    assert ahead.engine.decodes_ahead


@pytest.mark.parametrize("fails", ["a pass", "reading"])
async def test_a_device_that_fails_ahead_drafts_token_by_token(
    fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    by_token, ahead = (drafter(Path.CAPTURED, ahead=ahead) for ahead in (False, True))
    decode, draft, calls = ahead.engine.runner.decode, ahead.draft, 0

    def fail(segments: Any, ids_N: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 and fails == "a pass":
            raise RuntimeError("out of memory")
        return decode(segments, ids_N)

    def fail_reading(logits_NV: Tensor, tasks: Any) -> Any:
        if calls >= 3 and len(tasks) > len(COUNTS) and fails == "reading":
            raise RuntimeError("out of memory")
        return draft(logits_NV, tasks)

    ahead.engine.runner.decode, ahead.draft = fail, fail_reading
    with caplog.at_level(logging.WARNING):
        found = await proposals(ahead, SAMPLED, ahead=1)
    assert found == await proposals(by_token, SAMPLED, ahead=1)
    assert calls >= 3
    assert not ahead.engine.decodes_ahead
    assert [one.message for one in caplog.records].count(
        "Tokens are now read one by one: drafting ahead failed"
    ) == 1


async def test_passes_end_where_a_cache_range_does() -> None:
    """A token by token pass then makes room."""
    by_token, ahead = (drafter(Path.CAPTURED, ahead=ahead) for ahead in (False, True))
    found: list[list[tuple[int, ...]]] = []
    for replica in (by_token, ahead):
        client = Client(replica, name="a", prompt=tuple(range(3, 128)), policy=GREEDY)  # pyright: ignore[reportArgumentType] - as above
        await finished(replica)
        client.send(Propose(**client.after(), count=8))
        await finished(replica)
        messages = await client.take()
        found.append([one.block.tokens for one in messages if isinstance(one, Proposal)])
    assert found[0] == found[1]
    assert len(found[0][0]) == 8


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("policy", [pytest.param(GREEDY, marks=on_a_gpu, id="greedy")])
async def test_blocks_of_a_gpu_are_those_drafted_token_by_token(policy: DecodingParams) -> None:
    by_token, ahead = (
        drafter(Path.CAPTURED, ahead=ahead, device="cuda") for ahead in (False, True)
    )
    expected, runs = await proposals(by_token, policy, ahead=1), counting(ahead)
    found = await proposals(ahead, policy, ahead=1)
    assert [[one[4] for one in of] for of in found] == [[one[4] for one in of] for of in expected]
    assert max(runs) >= 2
    assert ahead.engine.decodes_ahead


@pytest.mark.parametrize(
    "policy", [pytest.param(one, marks=on_a_gpu, id=name) for name, one in POLICIES.items()]
)
def test_passes_of_a_block_do_not_wait_for_the_device(policy: DecodingParams) -> None:
    model = build("llama")
    nn.Module.to(model, "cuda")
    runner = CudaGraphRunner(model)
    runner.resize(num_slots=1024)
    tasks = [DraftTask(policy=policy, position=0, block_start=0)] * 2
    ids_N = torch.tensor([5, 6], device="cuda")

    def step(ids_N: Tensor, past: int) -> Tensor:
        segments = [
            Segment(start=start, past=past, tokens=(0,), num_logits=1) for start in (0, 128)
        ]
        return draw(runner.decode(segments, ids_N), tasks)

    with torch.inference_mode():
        ids_N = step(ids_N, 20)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(step(ids_N, 21), 22)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert runner.captured_buckets
