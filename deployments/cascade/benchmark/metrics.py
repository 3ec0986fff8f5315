"""The metrics of one run: throughput, latencies, goodput and what the cascade did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from cascade.errors import InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cascade.benchmark.load import LoadResult
    from cascade.evaluation.client import CompletionResult


# A time over all requests: `mean_ms`, `p50_ms`, `p95_ms` and `p99_ms`.
Percentiles: TypeAlias = dict[str, float]

# A service level objective: limits in ms of `ttft`, `tpot` and `latency`, any of them.
Slo: TypeAlias = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """One run. Ratios are None where the denominator is 0."""

    requests: int
    failed: int
    wall_s: float
    tokens: int  # of all answers
    tokens_per_s: float
    requests_per_s: float
    ttft: Percentiles  # time to the first text
    tpot: Percentiles  # time per output token after the first text
    latency: Percentiles  # of whole answers
    goodput_per_s: float  # answers a second within the SLO
    good_share: float
    rounds: int
    round_ms: float | None  # mean time of a round after the first
    tokens_per_round: float | None
    tokens_per_expert_pass: float | None
    drafted_per_round: float | None
    acceptance: float | None  # accepted of drafted tokens
    bytes_per_token: float | None  # between router and tiers, both ways
    drafter_waited_s: float  # for which the router's loop waited, summed over all answers
    expert_waited_s: float
    busy: dict[str, float]  # share of the run, by tier
    hidden: float | None  # share of the drafter's busy time that the router did not wait for
    prompt_ms: float | None  # mean by the server's own timings, if it has any
    predicted_ms: float | None  # the same for all tokens after the first
    lengths: dict[str, int]  # answers by the reason of their last draft length
    blocks: dict[int, int]  # traced rounds after the first, by number of drafted tokens


def parse_slo(text: str) -> Slo:
    """Return an objective: `parse_slo("ttft=200,tpot=30ms") == {"ttft": 200, "tpot": 30}`.

    Raises:
        InvalidMeasurement: A part has another name, or no number of at least 0.
    """
    slo: Slo = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        try:
            slo[name] = float(value.removesuffix("ms"))
        except ValueError:
            name = ""
        if name not in {"ttft", "tpot", "latency"} or slo[name] < 0:
            raise InvalidMeasurement(
                f"--slo has {part!r}; write ttft=200,tpot=30,latency=2000, any of them, in ms"
            )
    return slo


def is_good(answer: CompletionResult, slo: Slo) -> bool:
    """Whether an answer is within an objective."""
    tpot_s = time_per_token_s(answer) or 0.0
    times_s = {"ttft": answer.ttft_s, "tpot": tpot_s, "latency": answer.latency_s}
    return all(1e3 * times_s[name] <= limit_ms for name, limit_ms in slo.items())


def time_per_token_s(answer: CompletionResult) -> float | None:
    """Return the mean time per output token after the first, or None for a single token."""
    if answer.completion_tokens < 2:  # noqa: PLR2004 - one token has no time between tokens
        return None
    return (answer.latency_s - answer.ttft_s) / (answer.completion_tokens - 1)


def summarize(
    run: LoadResult, *, slo: Slo | None = None, busy_s: Mapping[str, float] | None = None
) -> RunMetrics:
    """Return the metrics of a run.

    Args:
        run: The answers and the wall time.
        slo: Which answers count as good; all if absent.
        busy_s: Seconds for which each tier was busy during the run.

    Raises:
        InvalidMeasurement: Every request failed.
    """
    answers = run.answers
    if not answers:
        raise InvalidMeasurement(f"all {len(run.results)} requests failed: {run.results[0]}")

    def total(name: str) -> float:
        return float(sum(answer.statistics.get(name, 0) for answer in answers))

    good = sum(is_good(answer, slo or {}) for answer in answers)
    tokens = sum(answer.completion_tokens for answer in answers)
    later_rounds = sum(max(0, answer.statistics.get("rounds", 0) - 1) for answer in answers)
    later_s = sum(answer.latency_s - answer.ttft_s for answer in answers)
    busy_s = busy_s or {}
    drafting_s, waited_s = busy_s.get("drafter", 0.0), total("drafter_s")
    return RunMetrics(
        requests=len(run.results),
        failed=len(run.results) - len(answers),
        wall_s=run.wall_s,
        tokens=tokens,
        tokens_per_s=tokens / run.wall_s,
        requests_per_s=len(answers) / run.wall_s,
        ttft=percentiles(answer.ttft_s for answer in answers),
        tpot=percentiles(
            tpot_s for answer in answers if (tpot_s := time_per_token_s(answer)) is not None
        ),
        latency=percentiles(answer.latency_s for answer in answers),
        goodput_per_s=good / run.wall_s,
        good_share=good / len(run.results),
        rounds=round(total("rounds")),
        round_ms=_ratio(1e3 * later_s, later_rounds),
        tokens_per_round=_ratio(tokens, total("rounds")),
        tokens_per_expert_pass=_ratio(tokens, total("expert_passes")),
        drafted_per_round=_ratio(total("drafted"), total("rounds")),
        acceptance=_ratio(total("accepted"), total("drafted")),
        bytes_per_token=_ratio(total("sent_bytes") + total("received_bytes"), tokens) or None,
        drafter_waited_s=waited_s,
        expert_waited_s=total("expert_s"),
        busy={tier: seconds / run.wall_s for tier, seconds in busy_s.items()},
        # Sessions that wait at the same time can wait for longer than the drafter was busy.
        hidden=max(0.0, 1 - waited_s / drafting_s) if drafting_s > 0 else None,
        prompt_ms=_ratio(total("prompt_ms"), len(answers)) or None,
        predicted_ms=_ratio(total("predicted_ms"), len(answers)) or None,
        lengths=dict(
            Counter(answer.statistics.get("draft_length_reason") or "none" for answer in answers)
        ),
        blocks=dict(Counter(drafted for answer in answers for drafted in answer.draft_lengths[1:])),
    )


def share_of_ideal(measured: RunMetrics, *, pass_ms: float) -> float | None:
    """Return the share of the ideal that a run reached, or None where no answer had two rounds.

    An ideal round takes one forward pass of the expert, with drafting and transport free. The share
    is the time of that pass over the measured time of a round.
    """
    return None if measured.round_ms is None else pass_ms / measured.round_ms


def percentiles(times_s: Iterable[float]) -> Percentiles:
    """Return the distribution of some times; zeros if there are none."""
    times_ms = [1e3 * time_s for time_s in times_s] or [0.0]
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99)).tolist()
    return {"mean_ms": fmean(times_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
