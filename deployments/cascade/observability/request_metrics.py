"""Metrics of answers, reported at most once a second per answer and when it ends."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from cascade.observability import metric_specs
from cascade.observability.metrics import BoundedLabel
from cascade.observability.observer import Observer
from cascade.types import Prices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cascade.observability.metric_specs import MetricSpec
    from cascade.observability.metrics import MetricBackend
    from cascade.observability.request_record import RequestRecord

    Series: TypeAlias = tuple[MetricSpec, tuple[str, ...]]

PERIOD_S = 1.0
MAX_REASONS = 16
MAX_CALLERS = 128  # with series of their own
MAX_POSITIONS = 32  # positions in a block with a series of their own


class RequestMetrics(Observer):
    """Adds the costs of answers to a metric backend."""

    def __init__(
        self,
        backend: MetricBackend,
        *,
        model: str,
        prices: Prices | None = None,
        suspects: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._prices = prices or Prices()
        self._suspects = suspects
        self._suspected: set[str] = set()  # kinds of rules that have been reported
        self._model = model
        self._clock = clock
        self._reason = BoundedLabel(MAX_REASONS)
        self._caller = BoundedLabel(MAX_CALLERS)
        self._reports: dict[RequestRecord, _Report] = {}

    def begin(self, record: RequestRecord) -> None:
        """Count the answer as running."""
        self._reports[record] = _Report(due_s=record.began_s + PERIOD_S)
        self._backend.set(metric_specs.RUNNING, len(self._reports))

    def progress(self, record: RequestRecord) -> None:
        """Report what is new, if the last report is long enough ago."""
        report = self._reports[record]
        if record.last_s >= report.due_s:
            report.due_s = record.last_s + PERIOD_S
            self._flush(record, report)

    def end(self, record: RequestRecord) -> None:
        """Report the rest, and the answer's times."""
        self._flush(record, self._reports.pop(record))
        backend, mode = self._backend, record.request.mode.value
        backend.set(metric_specs.RUNNING, len(self._reports))
        self._report_suspects()
        backend.add(metric_specs.ANSWERS, 1, mode, record.rule, record.finish)
        if record.request.policy.divergence_budget is not None:
            outcome = "spent" if record.statistics.spent_budgets else "left"
            backend.add(metric_specs.BUDGETS, 1, record.rule, outcome)
        if (caller := record.request.caller).has_key:
            name, prompt = self._caller(caller.name), len(record.request.client_prompt)
            backend.add(metric_specs.CALLER_ANSWERS, 1, name, record.finish)
            backend.add(metric_specs.CALLER_TOKENS, prompt, name, "prompt")
            backend.add(metric_specs.CALLER_TOKENS, record.tokens, name, "completion")
        backend.observe(metric_specs.ANSWER_S, self._clock() - record.began_s, mode)
        if record.first_s is not None:
            backend.observe(metric_specs.FIRST_TOKEN_S, record.first_s - record.began_s, mode)
            if record.tokens > 1:
                decode_s = record.last_s - record.first_s
                backend.observe(metric_specs.TOKEN_S, decode_s / (record.tokens - 1), mode)
        costs = record.statistics
        if record.drafts:
            backend.observe(metric_specs.ROUND_TRIP_S, costs.drafter_s / record.drafts, "drafter")
        if costs.expert_passes:
            trip_s = costs.expert_s / costs.expert_passes
            backend.observe(metric_specs.ROUND_TRIP_S, trip_s, "expert")

    def _report_suspects(self) -> None:
        now = self._suspects()
        self._suspected |= set(now)
        for rule in self._suspected:
            self._backend.set(metric_specs.SUSPECTS, now.get(rule, 0), rule)

    def _flush(self, record: RequestRecord, report: _Report) -> None:
        for (spec, labels), total in self._totals(record):
            new = total - report.reported.get((spec.name, labels), 0)
            if new > 0:
                report.reported[spec.name, labels] = total
                self._backend.add(spec, new, *labels)

    def _totals(self, record: RequestRecord) -> Iterator[tuple[Series, float]]:
        """Yield what the answer has added to each counter so far."""
        costs, rule, model = record.statistics, record.rule, self._model
        if record.first_s is not None:
            yield (metric_specs.PROMPT_TOKENS, ()), len(record.request.client_prompt)
        yield (metric_specs.CACHED_PROMPT_TOKENS, ()), costs.cached_prompt_tokens
        yield (metric_specs.TOKENS, (rule, "drafter")), costs.drafter_tokens
        yield (metric_specs.TOKENS, (rule, "kept")), costs.kept_tokens
        yield (metric_specs.TOKENS, (rule, "expert")), costs.expert_tokens
        yield (metric_specs.TOKENS, (rule, "forced")), costs.forced_tokens
        yield (metric_specs.DRAFTED, (rule,)), costs.drafted
        yield (metric_specs.ACCEPTED, (rule,)), costs.accepted
        yield (metric_specs.JUDGED, (rule,)), costs.judged
        yield (metric_specs.DEFERRED, (rule,)), costs.deferred
        yield (metric_specs.LOST_MASS, (rule,)), costs.lost_mass
        yield (metric_specs.DIVERGENCE, (rule,)), costs.divergence
        yield (metric_specs.UNMEASURED, (rule,)), costs.unmeasured_tokens
        yield (metric_specs.PREDICTED, ("accepted",)), costs.predicted_accepted
        yield (metric_specs.PREDICTED, ("rejected",)), costs.predicted_rejected
        yield (metric_specs.PASSES, ("drafter",)), costs.drafter_passes
        yield (metric_specs.PASSES, ("expert",)), costs.expert_passes
        yield (metric_specs.PASS_S, ("drafter",)), costs.drafter_pass_s
        yield (metric_specs.PASS_S, ("expert",)), costs.expert_pass_s
        price = self._prices.of(costs)
        yield (metric_specs.PRICE, ("drafter",)), price.drafter or 0.0
        yield (metric_specs.PRICE, ("expert",)), price.expert or 0.0
        yield (metric_specs.WAITED_S, ("drafter",)), costs.drafter_s
        yield (metric_specs.WAITED_S, ("expert",)), costs.expert_s
        yield (metric_specs.BYTES, ("sent",)), costs.sent_bytes
        yield (metric_specs.BYTES, ("received",)), costs.received_bytes
        for name, count in costs.failover_causes.items():
            tier, cause = name.split()
            yield (metric_specs.FAILOVERS, (tier, cause)), count
        reasons = Counter[str]()
        for cause, count in costs.undrafted_rounds.items():
            yield (metric_specs.UNDRAFTED, (rule, cause)), count
        for reason, count in costs.draft_length_reasons.items():
            reasons[self._reason(reason)] += count
        for reason, count in reasons.items():
            yield (metric_specs.ROUNDS, (rule, reason)), count
        accepted = record.accepted_at()
        yield (metric_specs.VLLM_DRAFTS, (model,)), record.drafts
        yield (metric_specs.VLLM_DRAFT_TOKENS, (model,)), costs.drafted
        yield (metric_specs.VLLM_ACCEPTED, (model,)), sum(accepted)
        for position, count in enumerate(accepted[:MAX_POSITIONS]):
            yield (metric_specs.ACCEPTED_AT, (str(position),)), count
            yield (metric_specs.VLLM_ACCEPTED_AT, (model, str(position))), count


class _Report:
    """What has been reported of an answer so far."""

    def __init__(self, *, due_s: float) -> None:
        self.due_s = due_s
        self.reported: dict[tuple[str, tuple[str, ...]], float] = {}
