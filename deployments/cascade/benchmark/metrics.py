"""What a run was like, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.errors import InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cascade.benchmark.load import Run
    from cascade.evaluation.client import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a time is spread over requests, in milliseconds."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an answer must keep to count as good: a service level objective, in milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_ms: float | None = None

    def met(self, answer: Answer) -> bool:
        """Whether an answer kept all of it."""
        tpot_s = time_per_token_s(answer)
        return (
            _within(answer.ttft_s, self.ttft_ms)
            and _within(0.0 if tpot_s is None else tpot_s, self.tpot_ms)
            and _within(answer.latency_s, self.latency_ms)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Ratios are None where there is nothing to divide by."""

    requests: int
    failed: int
    wall_s: float
    tokens: int  # of all answers
    tokens_per_s: float
    requests_per_s: float
    ttft: Spread  # time to the first text
    tpot: Spread  # time per output token after the first text
    latency: Spread  # of whole answers
    goodput_per_s: float  # answers a second that keep the objective
    good_share: float
    rounds: int
    round_ms: float | None  # time of a round after the first
    tokens_per_round: float | None
    tokens_per_expert_pass: float | None
    drafted_per_round: float | None
    acceptance: float | None  # accepted of drafted tokens
    bytes_per_token: float | None  # on the wire between router and tiers, both ways
    drafter_waited_s: float  # for which the loop stood still, over all answers
    expert_waited_s: float
    busy: dict[str, float]  # share of the run, by tier
    hidden: float | None  # share of the drafter's busy time for which nobody waited
    lengths: dict[str, int]  # reasons of draft lengths, and how many answers ended with each
    blocks: dict[int, int]  # drafted tokens, and how many traced rounds after a first had so many


def parse_objective(text: str) -> Objective:
    """Return an objective: `parse_objective("ttft=200,tpot=30")`, in milliseconds.

    Raises:
        InvalidMeasurement: It names something else, or no number.
    """
    wanted: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        field = f"{name.strip()}_ms"
        try:
            wanted[field] = float(value.removesuffix("ms"))
        except ValueError:
            field = ""
        if field not in Objective.__slots__ or wanted[field] < 0:
            raise InvalidMeasurement(
                f"--slo has {part!r}; write ttft=200,tpot=30,latency=2000, any of them, in ms"
            )
    return Objective(**wanted)


def time_per_token_s(answer: Answer) -> float | None:
    """Return the mean time of an output token after the first, or None where there was one."""
    if answer.completion_tokens < 2:  # noqa: PLR2004 - one token has no time between tokens
        return None
    return (answer.latency_s - answer.ttft_s) / (answer.completion_tokens - 1)


def figures(
    run: Run, *, objective: Objective | None = None, busy_s: Mapping[str, float] | None = None
) -> Figures:
    """Return the figures of a run.

    Args:
        run: What was asked and answered.
        objective: What makes an answer good; anything does if absent.
        busy_s: Seconds that each tier was busy during the run.

    Raises:
        InvalidMeasurement: No request was answered.
    """
    answers = run.answers
    if not answers:
        raise InvalidMeasurement(f"all {len(run.asked)} requests failed: {run.asked[0].error}")
    good = sum(map((objective or Objective()).met, answers))
    tokens = sum(answer.completion_tokens for answer in answers)
    total = {name: _sum(answers, name) for name in _SUMMED}
    busy_s = busy_s or {}
    drafting_s = busy_s.get("drafter", 0.0)
    return Figures(
        requests=len(run.asked),
        failed=len(run.asked) - len(answers),
        wall_s=run.wall_s,
        tokens=tokens,
        tokens_per_s=tokens / run.wall_s,
        requests_per_s=len(answers) / run.wall_s,
        ttft=spread(answer.ttft_s for answer in answers),
        tpot=spread(found for answer in answers if (found := time_per_token_s(answer)) is not None),
        latency=spread(answer.latency_s for answer in answers),
        goodput_per_s=good / run.wall_s,
        good_share=good / len(run.asked),
        rounds=round(total["rounds"]),
        round_ms=_round_ms(answers),
        tokens_per_round=_ratio(tokens, total["rounds"]),
        tokens_per_expert_pass=_ratio(tokens, total["expert_passes"]),
        drafted_per_round=_ratio(total["drafted"], total["rounds"]),
        acceptance=_ratio(total["accepted"], total["drafted"]),
        bytes_per_token=_ratio(total["sent_bytes"] + total["received_bytes"], tokens) or None,
        drafter_waited_s=total["drafter_s"],
        expert_waited_s=total["expert_s"],
        busy={name: seconds / run.wall_s for name, seconds in busy_s.items()},
        hidden=_hidden(drafting_s, total["drafter_s"]),
        lengths=_reasons(answers),
        blocks=dict(Counter(drafted for answer in answers for drafted in answer.blocks[1:])),
    )


def of_ideal(measured: Figures, *, pass_ms: float) -> float | None:
    """Return the share of the ideal that a run reached, or None where no answer had two rounds.

    The ideal round is one pass of the expert, with drafting and transport free; so the share is the
    time of that pass over the time that a round took.
    """
    return None if measured.round_ms is None else pass_ms / measured.round_ms


def spread(times_s: Iterable[float]) -> Spread:
    """Return the spread of times; zeros where there are none."""
    times_ms = [1e3 * time_s for time_s in times_s] or [0.0]
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99)).tolist()
    return Spread(mean_ms=fmean(times_ms), p50_ms=p50, p95_ms=p95, p99_ms=p99)


_SUMMED = (
    "rounds", "drafted", "accepted", "expert_passes", "drafter_s", "expert_s", "sent_bytes",
    "received_bytes",
)  # fmt: skip


def _sum(answers: Sequence[Answer], name: str) -> float:
    values: list[Any] = [answer.statistics.get(name, 0) for answer in answers]
    return float(sum(values))


def _reasons(answers: Sequence[Answer]) -> dict[str, int]:
    found: dict[str, int] = {}
    for answer in answers:
        reason = answer.statistics.get("draft_length_reason") or "none"
        found[reason] = found.get(reason, 0) + 1
    return found


def _round_ms(answers: Sequence[Answer]) -> float | None:
    later = sum(max(0, answer.statistics.get("rounds", 0) - 1) for answer in answers)
    return _ratio(1e3 * sum(answer.latency_s - answer.ttft_s for answer in answers), later)


def _hidden(drafting_s: float, waited_s: float) -> float | None:
    """Return 1 - waited / drafting: sessions that wait at once may make the waits the longer."""
    return None if drafting_s <= 0 else max(0.0, 1 - waited_s / drafting_s)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _within(time_s: float, limit_ms: float | None) -> bool:
    return limit_ms is None or 1e3 * time_s <= limit_ms
