"""Every metric there is: its name, kind, labels and meaning.

Ray puts `ray_` before a name; Prometheus ends a counter's in `_total`. A label's values are few and
known: tiers, modes, rules, origins, positions in a block, reasons and causes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FAST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

SLOW_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class Kind(StrEnum):
    """How values of a family add up."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """A metric and its labels."""

    name: str
    about: str
    kind: Kind = Kind.COUNTER
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram


# What answers cost: from the router, at most once a second of each answer.

ANSWERS = MetricSpec(
    name="cascade_answers",
    about="Answers that ended; finish is stop, length, closed (by the client or a stop string), "
    "or the gRPC status of the error",
    labels=("mode", "rule", "finish"),
)

RUNNING = MetricSpec(name="cascade_running_answers", about="Answers being written", kind=Kind.GAUGE)

PROMPT_TOKENS = MetricSpec(name="cascade_prompt_tokens", about="Tokens of the prompts")

CACHED_PROMPT_TOKENS = MetricSpec(
    name="cascade_cached_prompt_tokens", about="Tokens of the prompts found in a cache"
)

TOKENS = MetricSpec(
    name="cascade_tokens",
    about="Tokens committed, by who wrote them: drafter, kept or expert",
    labels=("rule", "origin"),
)

ROUNDS = MetricSpec(
    name="cascade_rounds",
    about="Blocks and verdicts, by what decided the length of the block",
    labels=("rule", "reason"),
)

DRAFTED = MetricSpec(name="cascade_drafted_tokens", about="Tokens drafted", labels=("rule",))

ACCEPTED = MetricSpec(
    name="cascade_accepted_tokens", about="Drafted tokens that were committed", labels=("rule",)
)

ACCEPTED_AT = MetricSpec(
    name="cascade_accepted_at_position",
    about="Blocks whose token at this place, from 0, was accepted",
    labels=("position",),
)

JUDGED = MetricSpec(
    name="cascade_judged_tokens", about="Drafted tokens that a rule decided on", labels=("rule",)
)

DEFERRED = MetricSpec(
    name="cascade_deferred_tokens", about="Tokens that a rule gave to the expert", labels=("rule",)
)

PREDICTED = MetricSpec(
    name="cascade_predicted_tokens",
    about="Tokens of clients' predictions that stood or fell",
    labels=("outcome",),
)

PASSES = MetricSpec(name="cascade_passes", about="Forward passes for answers", labels=("tier",))

WAITED_S = MetricSpec(
    name="cascade_waited_seconds", about="Seconds that answers waited for a tier", labels=("tier",)
)

BYTES = MetricSpec(
    name="cascade_wire_bytes", about="Bytes between router and tiers", labels=("direction",)
)

FAILOVERS = MetricSpec(
    name="cascade_failovers",
    about="Times a session went on elsewhere or without the tier: "
    "lost, full, late, broken (its passes fail) or collapsed (what it drafts is refused)",
    labels=("tier", "cause"),
)

ANSWER_S = MetricSpec(
    name="cascade_answer_seconds",
    about="Time of an answer",
    kind=Kind.HISTOGRAM,
    labels=("mode",),
    buckets=SLOW_S,
)

FIRST_TOKEN_S = MetricSpec(
    name="cascade_first_token_seconds",
    about="Time to the first token",
    kind=Kind.HISTOGRAM,
    labels=("mode",),
    buckets=(*FAST_S, 5.0, 10.0),
)

TOKEN_S = MetricSpec(
    name="cascade_token_seconds",
    about="Time for each token after the first, the mean of an answer",
    kind=Kind.HISTOGRAM,
    labels=("mode",),
    buckets=FAST_S,
)

ROUND_TRIP_S = MetricSpec(
    name="cascade_round_trip_seconds",
    about="Time from a question to a tier's answer as the router sees it, the mean of an answer",
    kind=Kind.HISTOGRAM,
    labels=("tier",),
    buckets=FAST_S,
)

# The same under the names that dashboards for vLLM read; Ray's names take no colon.

VLLM_DRAFTS = MetricSpec(
    name="vllm:spec_decode_num_drafts", about="Blocks drafted", labels=("model_name",)
)

VLLM_DRAFT_TOKENS = MetricSpec(
    name="vllm:spec_decode_num_draft_tokens", about="Tokens drafted", labels=("model_name",)
)

VLLM_ACCEPTED = MetricSpec(
    name="vllm:spec_decode_num_accepted_tokens",
    about="Drafted tokens that were accepted",
    labels=("model_name",),
)

VLLM_ACCEPTED_AT = MetricSpec(
    name="vllm:spec_decode_num_accepted_tokens_per_pos",
    about="Blocks whose token at this place was accepted",
    labels=("model_name", "position"),
)

ROUTER = (
    *(ANSWERS, RUNNING, PROMPT_TOKENS, CACHED_PROMPT_TOKENS, TOKENS, ROUNDS, DRAFTED, ACCEPTED),
    *(ACCEPTED_AT, JUDGED, DEFERRED, PREDICTED, PASSES, WAITED_S, BYTES, FAILOVERS),
    *(ANSWER_S, FIRST_TOKEN_S, TOKEN_S, ROUND_TRIP_S),
    *(VLLM_DRAFTS, VLLM_DRAFT_TOKENS, VLLM_ACCEPTED, VLLM_ACCEPTED_AT),
)

# What an engine does: from each replica of a tier, every few seconds.

_TIER = ("tier",)

ENGINE_PASSES = MetricSpec(name="cascade_engine_passes", about="Forward passes", labels=_TIER)

ENGINE_TOKENS = MetricSpec(
    name="cascade_engine_tokens", about="Tokens run through the model", labels=_TIER
)

ENGINE_TURNS = MetricSpec(
    name="cascade_engine_turns",
    about="Sessions in passes; by passes, the mean batch",
    labels=_TIER,
)

ENGINE_WAITS = MetricSpec(
    name="cascade_engine_waits", about="Questions whose first pass has begun", labels=_TIER
)

ENGINE_WAITED_S = MetricSpec(
    name="cascade_engine_waited_seconds",
    about="Seconds that questions waited for their first pass; by waits, the mean queue wait",
    labels=_TIER,
)

ENGINE_QUEUED_TOKENS = MetricSpec(
    name="cascade_engine_queued_tokens",
    about="Tokens that waited when a pass was planned; by passes, the mean backlog",
    labels=_TIER,
)

ENGINE_PREFIX_HITS = MetricSpec(
    name="cascade_engine_prefix_hits", about="Sessions that began with cached tokens", labels=_TIER
)

ENGINE_PREFIX_TOKENS = MetricSpec(
    name="cascade_engine_prefix_tokens", about="Tokens found so", labels=_TIER
)

ENGINE_PREEMPTIONS = MetricSpec(
    name="cascade_engine_preemptions",
    about="Caches of open sessions dropped to make room",
    labels=_TIER,
)

ENGINE_BUSY = MetricSpec(
    name="cascade_engine_busy_ratio",
    about="Share of the last ten seconds or so spent in passes",
    kind=Kind.GAUGE,
    labels=_TIER,
)

ENGINE_WAITING = MetricSpec(
    name="cascade_engine_waiting", about="Questions not answered", kind=Kind.GAUGE, labels=_TIER
)

ENGINE_SESSIONS = MetricSpec(
    name="cascade_engine_sessions", about="Sessions open", kind=Kind.GAUGE, labels=_TIER
)

ENGINE_LEASES = MetricSpec(
    name="cascade_engine_leases", about="Leases held", kind=Kind.GAUGE, labels=_TIER
)

ENGINE_BUDGET = MetricSpec(
    name="cascade_engine_budget_tokens",
    about="Most tokens that a pass runs",
    kind=Kind.GAUGE,
    labels=_TIER,
)

CACHE_TOKENS = MetricSpec(
    name="cascade_engine_cache_tokens",
    about="Tokens in the KV cache: live (of open sessions), idle (kept for like prompts) or free",
    kind=Kind.GAUGE,
    labels=("tier", "state"),
)

ENGINE = (
    *(ENGINE_PASSES, ENGINE_TOKENS, ENGINE_TURNS, ENGINE_WAITS, ENGINE_WAITED_S),
    *(ENGINE_QUEUED_TOKENS, ENGINE_PREFIX_HITS, ENGINE_PREFIX_TOKENS, ENGINE_PREEMPTIONS),
    *(ENGINE_BUSY, ENGINE_WAITING, ENGINE_SESSIONS, ENGINE_LEASES, ENGINE_BUDGET, CACHE_TOKENS),
)
