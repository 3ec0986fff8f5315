"""What answers cost, as metrics; an answer reports at most once a second, and when it ends."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from cascade.observability import metric_specs
from cascade.observability.metrics import BoundedLabel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cascade.observability.metric_specs import MetricSpec
    from cascade.observability.metrics import MetricBackend
    from cascade.observability.observer import RequestRecord

    Series: TypeAlias = tuple[MetricSpec, tuple[str, ...]]

PERIOD_S = 1.0

MOST_REASONS = 16

LONGEST_BLOCK = 32  # places in a block with a series of their own


class RequestMetrics:
    """An observer that adds up what answers cost in a sink."""

    def __init__(
        self, sink: MetricBackend, *, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sink = sink
        self._model = model
        self._clock = clock
        self._reason = BoundedLabel(MOST_REASONS)
        self._reports: dict[RequestRecord, _Report] = {}

    def begin(self, account: RequestRecord) -> None:
        """Count an answer as running."""
        self._reports[account] = _Report(due_s=account.began_s + PERIOD_S)
        self._sink.set(metric_specs.RUNNING, len(self._reports))

    def progress(self, account: RequestRecord) -> None:
        """Report what is new, if the last time is long enough ago."""
        report = self._reports[account]
        if account.last_s >= report.due_s:
            report.due_s = account.last_s + PERIOD_S
            self._flush(account, report)

    def end(self, account: RequestRecord) -> None:
        """Report the rest, and the answer's times."""
        self._flush(account, self._reports.pop(account))
        sink, mode = self._sink, account.request.mode.value
        sink.set(metric_specs.RUNNING, len(self._reports))
        sink.add(metric_specs.ANSWERS, 1, mode, account.rule, account.finish)
        sink.observe(metric_specs.ANSWER_S, self._clock() - account.began_s, mode)
        if account.first_s is not None:
            sink.observe(metric_specs.FIRST_TOKEN_S, account.first_s - account.began_s, mode)
            if account.tokens > 1:
                writing_s = account.last_s - account.first_s
                sink.observe(metric_specs.TOKEN_S, writing_s / (account.tokens - 1), mode)
        entry = account.statistics
        if account.drafts:
            sink.observe(metric_specs.ROUND_TRIP_S, entry.drafter_s / account.drafts, "drafter")
        if entry.expert_passes:
            sink.observe(metric_specs.ROUND_TRIP_S, entry.expert_s / entry.expert_passes, "expert")

    def _flush(self, account: RequestRecord, report: _Report) -> None:
        for (family, labels), total in self._totals(account):
            fresh = total - report.known.get((family.name, labels), 0)
            if fresh > 0:
                report.known[family.name, labels] = total
                self._sink.add(family, fresh, *labels)

    def _totals(self, account: RequestRecord) -> Iterator[tuple[Series, float]]:
        """Yield what an answer has added to each counter so far."""
        yield from _costs(account)
        reasons = Counter[str]()
        for reason, count in account.reasons.items():
            reasons[self._reason(reason)] += count
        for reason, count in reasons.items():
            yield (metric_specs.ROUNDS, (account.rule, reason)), count
        yield (metric_specs.VLLM_DRAFTS, (self._model,)), account.drafts
        yield (metric_specs.VLLM_DRAFT_TOKENS, (self._model,)), account.statistics.drafted
        accepted = account.accepted_at()
        yield (metric_specs.VLLM_ACCEPTED, (self._model,)), sum(accepted)
        for place, count in enumerate(accepted[:LONGEST_BLOCK]):
            yield (metric_specs.ACCEPTED_AT, (str(place),)), count
            yield (metric_specs.VLLM_ACCEPTED_AT, (self._model, str(place))), count


class _Report:
    """What an answer has reported so far."""

    def __init__(self, *, due_s: float) -> None:
        self.due_s = due_s
        self.known: dict[tuple[str, tuple[str, ...]], float] = {}


def _costs(account: RequestRecord) -> Iterator[tuple[Series, float]]:
    entry, rule = account.statistics, account.rule
    if account.first_s is not None:
        yield (metric_specs.PROMPT_TOKENS, ()), len(account.request.prompt)
    yield (metric_specs.CACHED_PROMPT_TOKENS, ()), entry.cached_prompt_tokens
    yield (metric_specs.TOKENS, (rule, "drafter")), entry.drafter_tokens
    yield (metric_specs.TOKENS, (rule, "kept")), entry.kept_tokens
    yield (metric_specs.TOKENS, (rule, "expert")), entry.expert_tokens
    yield (metric_specs.DRAFTED, (rule,)), entry.drafted
    yield (metric_specs.ACCEPTED, (rule,)), entry.accepted
    yield (metric_specs.JUDGED, (rule,)), entry.judged
    yield (metric_specs.DEFERRED, (rule,)), entry.deferred
    yield (metric_specs.PREDICTED, ("accepted",)), entry.predicted_accepted
    yield (metric_specs.PREDICTED, ("rejected",)), entry.predicted_rejected
    yield (metric_specs.PASSES, ("drafter",)), entry.drafter_passes
    yield (metric_specs.PASSES, ("expert",)), entry.expert_passes
    yield (metric_specs.WAITED_S, ("drafter",)), entry.drafter_s
    yield (metric_specs.WAITED_S, ("expert",)), entry.expert_s
    yield (metric_specs.BYTES, ("sent",)), entry.sent_bytes
    yield (metric_specs.BYTES, ("received",)), entry.received_bytes
    for what, count in entry.failover_causes.items():
        tier, cause = what.split()
        yield (metric_specs.FAILOVERS, (tier, cause)), count
