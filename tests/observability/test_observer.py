"""Whatever the end of an answer, it is counted once, logged once, and nothing of its text is."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.observability.test_metrics import exposed, key
from tests.support.accounts import check_accounts

from cascade.errors import ExpertUnavailable
from cascade.observability.metric_specs import ROUTER
from cascade.observability.metrics import PrometheusMetrics
from cascade.observability.observer import ObservedGenerator
from cascade.observability.request_log import JsonLines, RequestLog
from cascade.observability.request_metrics import RequestMetrics
from cascade.rules import Chow, Lossless, Rule, TokenV3
from cascade.types import (
    DecodingParams,
    FinishReason,
    Mode,
    Origin,
    OutputChunk,
    Request,
    SamplingParams,
    SequenceCascadeParams,
    Statistics,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade.local import LocalServer
    from cascade.types import TokenLogprob

VLLM = "vllm:spec_decode_num"

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scripted:
    """Writes pieces of one token, then calls `end`; notes what happens to it."""

    def __init__(
        self,
        pieces: int,
        *,
        end: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
        reason: Callable[[int], str] = lambda _: "fixed",
    ) -> None:
        self.closed = False
        self._pieces = pieces
        self._end = end
        self._clock = clock or Clock()
        self._reason = reason

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        del request
        entry = Statistics()
        try:
            for number in range(self._pieces):
                self._clock.now_s += 0.4
                entry.rounds += 1
                entry.expert_tokens += 1
                reason = self._reason(number)
                reasons = entry.draft_length_reasons
                reasons[reason] = reasons.get(reason, 0) + 1
                last = number == self._pieces - 1
                yield OutputChunk(
                    tokens=(number,),
                    origins=(Origin.EXPERT,),
                    finish=FinishReason.LENGTH if last else None,
                    statistics=entry,
                )
            self._end()
        finally:
            entry.sent_bytes = 7  # known only when the session has left its place
            self.closed = True

    async def score(
        self, tokens: Sequence[int], *, top: int, caller: object = None
    ) -> tuple[TokenLogprob, ...]:
        del tokens, top, caller
        return ()


class Watched:
    """A generator under observation, and what was seen."""

    def __init__(self, generator: Any, *, clock: Clock | None = None) -> None:
        clock = clock or Clock()
        self.sink = PrometheusMetrics(ROUTER)
        metrics = RequestMetrics(self.sink, model="pair", clock=clock)
        self.generator = ObservedGenerator(
            generator, observers=(metrics, RequestLog(clock=clock)), clock=clock
        )

    def samples(self) -> dict[str, float]:
        return exposed(self.sink.registry)

    async def answer(self, request: Request) -> list[OutputChunk]:
        return [piece async for piece in self.generator.generate(request)]


@pytest.fixture
def lines() -> Any:
    """The log's lines, as JSON."""
    said: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(json.loads(JsonLines().format(record)))

    logger, handler = logging.getLogger("cascade.answers"), Keep()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(before)


def ended(mode: str, finish: str) -> str:
    return key("cascade_answers_total", mode=mode, rule="lossless", finish=finish)


def asked(**more: Any) -> Request:
    return Request(prompt=(1, 2, 3), policy=GREEDY, name="abc", **more)


async def test_metrics_say_what_the_answer_says_of_itself(toy_stack: LocalServer) -> None:
    watched = Watched(toy_stack.router)
    request = asked(max_tokens=30, draft_tokens=4, mode=Mode.SPECULATIVE)
    entry = (await watched.answer(request))[-1].statistics
    assert entry is not None
    found = watched.samples()
    assert found[key("cascade_rounds_total", rule="lossless", reason="requested")] == entry.rounds
    assert found[key("cascade_drafted_tokens_total", rule="lossless")] == entry.drafted
    assert found[key("cascade_accepted_tokens_total", rule="lossless")] == entry.accepted
    assert (
        found[key("cascade_tokens_total", rule="lossless", origin="expert")] == entry.expert_tokens
    )
    assert found[key("cascade_passes_total", tier="expert")] == entry.expert_passes
    assert found[key("cascade_wire_bytes_total", direction="sent")] == entry.sent_bytes > 0
    assert found[key("cascade_waited_seconds_total", tier="expert")] == pytest.approx(
        entry.expert_s
    )
    assert found[ended("speculative", "length")] == 1
    assert found[key("cascade_prompt_tokens_total")] == 3
    check_vllm_names(found, entry, places=4)


def check_vllm_names(found: dict[str, float], entry: Statistics, *, places: int) -> None:
    """Check the metrics of one answer under vLLM's names."""
    for name, value in (
        ("drafts", sum(entry.accepted_lengths)),
        ("draft_tokens", entry.drafted),
        ("accepted_tokens", entry.accepted),
    ):
        assert found.get(key(f"{VLLM}_{name}_total", model_name="pair"), 0) == value
    for place in range(places):
        accepted = sum(entry.accepted_lengths[place + 1 :])
        ours = key("cascade_accepted_at_position_total", position=str(place))
        vllms = key(f"{VLLM}_accepted_tokens_per_pos_total", model_name="pair", position=str(place))
        assert found.get(ours, 0) == found.get(vllms, 0) == accepted


ACCOUNTS: dict[str, tuple[Mode, Rule, float]] = {
    "speculative": (Mode.SPECULATIVE, Lossless(), 0),
    "cascade": (Mode.CASCADE, TokenV3(alpha=0.5), 0),
    "chow": (Mode.CASCADE, Chow(alpha=0.5), 0),
    "token cascade": (Mode.TOKEN_CASCADE, Chow(alpha=0.5), 0),
    "drafter": (Mode.DRAFTER_ONLY, Lossless(), 0),
    "expert": (Mode.EXPERT_ONLY, Lossless(), 0),
    "draft kept": (Mode.SEQUENCE_CASCADE, Lossless(), -99),
    "draft thrown away": (Mode.SEQUENCE_CASCADE, Lossless(), 0),
}


@pytest.mark.parametrize(("mode", "rule", "threshold"), ACCOUNTS.values(), ids=ACCOUNTS)
async def test_metrics_trace_and_log_agree_in_every_mode(
    toy_stack: LocalServer,
    lines: list[dict[str, Any]],
    mode: Mode,
    rule: Rule,
    threshold: float,
) -> None:
    """A draft that is thrown away was drafted, judged and deferred, and nowhere accepted."""
    watched = Watched(toy_stack.router)
    request = Request(
        prompt=(3, 1, 4),
        policy=replace(GREEDY, rule=rule),
        mode=mode,
        max_tokens=40,
        draft_tokens=4,
        patience=SequenceCascadeParams(threshold=threshold),
        trace=True,
    )
    pieces = await watched.answer(request)
    entry = pieces[-1].statistics
    assert entry is not None
    check_accounts(request, entry, [origin for piece in pieces for origin in piece.origins])
    found = watched.samples()
    for name, value in (
        ("drafted", entry.drafted),
        ("accepted", entry.accepted),
        ("judged", entry.judged),
        ("deferred", entry.deferred),
    ):
        assert found.get(key(f"cascade_{name}_tokens_total", rule=rule.kind), 0) == value
        assert lines[0]["answer"][name] == value
    rounds = [value for name, value in found.items() if name.startswith("cascade_rounds_total")]
    assert sum(rounds) == sum(lines[0]["answer"]["draft_lengths"].values()) == entry.rounds
    check_vllm_names(found, entry, places=16)
    if threshold == 0 and mode is Mode.SEQUENCE_CASCADE:
        assert (entry.drafted, entry.judged, entry.deferred, entry.accepted) == (40, 40, 40, 0)
        assert [one.drafted for one in entry.trace if one.drafted] == [16, 16, 8]
        assert entry.expert_tokens == 40


async def test_rounds_without_a_draft_are_counted_by_rule_and_cause(
    lines: list[dict[str, Any]],
) -> None:
    class Alone(Scripted):
        async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
            async for chunk in super().generate(request):
                assert chunk.statistics is not None
                chunk.statistics.undrafted_rounds = {"late": 2, "lease": 1}
                yield chunk

    watched = Watched(Alone(3))
    await watched.answer(asked())
    for cause, rounds in (("late", 2), ("lease", 1)):
        name = key("cascade_undrafted_rounds_total", rule="lossless", cause=cause)
        assert watched.samples()[name] == rounds
    assert lines[0]["answer"]["undrafted_rounds"] == {"late": 2, "lease": 1}


async def test_an_answer_reports_while_it_is_written_and_counts_nothing_twice() -> None:
    clock = Clock()
    watched = Watched(Scripted(10, clock=clock), clock=clock)
    name = key("cascade_tokens_total", rule="lossless", origin="expert")
    pieces = watched.generator.generate(asked())
    seen = [watched.samples().get(name, 0) async for _ in pieces]
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert watched.samples()[name] == 10
    assert watched.samples()[key("cascade_running_answers")] == 0
    assert watched.samples()[key("cascade_token_seconds_sum", mode="cascade")] == pytest.approx(0.4)


async def test_reasons_beyond_the_bound_are_counted_as_others() -> None:
    watched = Watched(Scripted(40, reason=str))
    await watched.answer(asked())
    rounds = {k: v for k, v in watched.samples().items() if k.startswith("cascade_rounds_total")}
    assert len(rounds) == 17
    assert rounds[key("cascade_rounds_total", rule="lossless", reason="other")] == 40 - 16


def _break() -> None:
    raise ExpertUnavailable("no expert answers")


def _defect() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("end", "error", "finish"),
    [
        (_break, ExpertUnavailable, "unavailable"),
        (_defect, ZeroDivisionError, "internal"),
    ],
)
async def test_an_error_passes_through_and_is_counted(
    end: Callable[[], None], error: type[Exception], finish: str, lines: list[dict[str, Any]]
) -> None:
    inner = Scripted(3, end=end)
    watched = Watched(inner)
    with pytest.raises(error):
        await watched.answer(asked())
    found = watched.samples()
    assert found[ended("cascade", finish)] == 1
    assert inner.closed
    (line,) = lines
    assert line["levelname"] == "WARNING"
    assert (line["answer"]["finish"], line["answer"]["error"]) == (finish, error.__name__)


async def test_an_answer_that_is_closed_early_is_counted_whole() -> None:
    inner = Scripted(5)
    watched = Watched(inner)
    pieces = watched.generator.generate(asked())
    await anext(pieces)
    await pieces.aclose()
    found = watched.samples()
    assert found[ended("cascade", "closed")] == 1
    assert found[key("cascade_wire_bytes_total", direction="sent")] == 7
    assert inner.closed


async def test_a_client_that_leaves_is_no_error(lines: list[dict[str, Any]]) -> None:
    class Stuck(Scripted):
        async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
            del request
            await asyncio.Event().wait()
            yield OutputChunk(tokens=(), origins=())

    watched = Watched(Stuck(1))
    task = asyncio.create_task(watched.answer(asked()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [(line["levelname"], line["answer"]["finish"]) for line in lines] == [("INFO", "closed")]


async def test_the_log_has_one_line_with_figures_and_no_text(
    lines: list[dict[str, Any]],
) -> None:
    watched = Watched(Scripted(4))
    request = asked(mode=Mode.TOKEN_CASCADE)
    request = replace(request, policy=replace(GREEDY, rule=Chow(alpha=0.5)))
    await watched.answer(request)
    (line,) = lines
    told = line["answer"]
    assert (told["id"], told["mode"], told["rule"]) == ("abc", "token_cascade", "chow")
    assert (told["tokens"], told["rounds"], told["finish"]) == (4, 4, "length")
    assert told["draft_lengths"] == {"fixed": 4}
    assert "abc: 4 tokens" in line["message"]
    assert not {"prompt", "text", "token_ids"} & set(told)
