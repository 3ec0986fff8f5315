"""Every metric: its name, kind, labels and meaning.

Ray prefixes names with `ray_`; Prometheus ends counters in `_total`. Label values are few and
known: tiers, modes, rules, origins, positions in a block, reasons and causes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FAST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SLOW_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class MetricKind(StrEnum):
    """How the values of a metric add up."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """A metric and its labels."""

    name: str
    about: str
    kind: MetricKind = MetricKind.COUNTER
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram


def _counter(name: str, about: str, labels: str = "") -> MetricSpec:
    return MetricSpec(name=name, about=about, labels=tuple(labels.split()))


def _gauge(name: str, about: str, labels: str = "") -> MetricSpec:
    return MetricSpec(name=name, about=about, kind=MetricKind.GAUGE, labels=tuple(labels.split()))


def _histogram(name: str, about: str, buckets: tuple[float, ...], labels: str = "") -> MetricSpec:
    return MetricSpec(
        name=name,
        about=about,
        kind=MetricKind.HISTOGRAM,
        labels=tuple(labels.split()),
        buckets=buckets,
    )


# What answers cost: reported by the router, at most once a second per answer.

ANSWERS = _counter(
    "cascade_answers",
    "Answers that ended; finish is stop, length, closed (by the client or a stop string), or the "
    "gRPC status of the error",
    "mode rule finish",
)
CALLER_ANSWERS = _counter(
    "cascade_caller_answers", "Answers that ended, by the name of the API key", "caller finish"
)
CALLER_TOKENS = _counter(
    "cascade_caller_tokens",
    "Tokens of callers with API keys; kind is prompt or completion",
    "caller kind",
)
RUNNING = _gauge("cascade_running_answers", "Answers being generated")
PROMPT_TOKENS = _counter("cascade_prompt_tokens", "Prompt tokens")
CACHED_PROMPT_TOKENS = _counter(
    "cascade_cached_prompt_tokens", "Prompt tokens found in a prefix cache"
)
TOKENS = _counter(
    "cascade_tokens", "Committed tokens by origin: drafter, kept, expert or forced", "rule origin"
)
ROUNDS = _counter("cascade_rounds", "Draft blocks by what decided their length", "rule reason")
UNDRAFTED = _counter(
    "cascade_undrafted_rounds",
    "Rounds in which the expert wrote alone although a draft was wanted: lease (none granted yet), "
    "late, lost, full, broken, collapsed (its drafts are rejected), context (too short) or empty "
    "(its text gave no token to draft)",
    "rule cause",
)
DRAFTED = _counter(
    "cascade_drafted_tokens",
    "Drafted tokens, and positions that the drafter itself deferred",
    "rule",
)
ACCEPTED = _counter("cascade_accepted_tokens", "Drafted tokens that were committed", "rule")
ACCEPTED_AT = _counter(
    "cascade_accepted_at_position",
    "Blocks whose token at this position, from 0, was accepted",
    "position",
)
JUDGED = _counter("cascade_judged_tokens", "Drafted tokens that a rule decided on", "rule")
DEFERRED = _counter("cascade_deferred_tokens", "Tokens that a rule deferred to the expert", "rule")
LOST_MASS = _counter(
    "cascade_lost_mass",
    "Probability of drafters on tokens that the expert has not, over drafted tokens; divided by"
    " them, the mean",
    "rule",
)
DIVERGENCE = _counter(
    "cascade_divergence",
    "Total variation between the distributions that were followed and the expert's, over tokens of"
    " which it is known",
    "rule",
)
UNMEASURED = _counter(
    "cascade_unmeasured_tokens", "Committed tokens whose divergence is not known", "rule"
)
BUDGETS = _counter(
    "cascade_divergence_budgets",
    "Answers with a divergence budget that ended, by whether it was spent: spent or left",
    "rule outcome",
)
PREDICTED = _counter(
    "cascade_predicted_tokens", "Tokens of clients' predictions, accepted or rejected", "outcome"
)
PASSES = _counter("cascade_passes", "Forward passes for answers", "tier")
PASS_S = _counter(
    "cascade_pass_seconds",
    "Seconds of forward passes that answers took: of each pass the part that their tokens are of"
    " all tokens in it",
    "tier",
)
PRICE = _counter(
    "cascade_price", "The same in the unit of price_per_s, of tiers that have a price", "tier"
)
WAITED_S = _counter("cascade_waited_seconds", "Seconds that answers waited for a tier", "tier")
BYTES = _counter("cascade_wire_bytes", "Bytes between router and tiers", "direction")
SUSPECTS = _gauge(
    "cascade_suspected_drafters",
    "Drafters all of whose drafts are rejected, so that a router hardly asks them under this rule",
    "rule",
)
FAILOVERS = _counter(
    "cascade_failovers",
    "Times a session moved to another replica or went on without the tier: lost, full, late, "
    "broken (its passes fail), collapsed (its drafts are rejected) or context (too short)",
    "tier cause",
)
ANSWER_S = _histogram("cascade_answer_seconds", "Duration of an answer", SLOW_S, "mode")
FIRST_TOKEN_S = _histogram(
    "cascade_first_token_seconds", "Time to the first token", (*FAST_S, 5.0, 10.0), "mode"
)
TOKEN_S = _histogram(
    "cascade_token_seconds", "Time per token after the first, the mean of an answer", FAST_S, "mode"
)
ROUND_TRIP_S = _histogram(
    "cascade_round_trip_seconds",
    "Time from a message to the tier's reply as the router sees it, the mean of an answer",
    FAST_S,
    "tier",
)

# The same under the names that vLLM's dashboards read.

VLLM_DRAFTS = _counter("vllm:spec_decode_num_drafts", "Draft blocks", "model_name")
VLLM_DRAFT_TOKENS = _counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens", "model_name")
VLLM_ACCEPTED = _counter(
    "vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens", "model_name"
)
VLLM_ACCEPTED_AT = _counter(
    "vllm:spec_decode_num_accepted_tokens_per_pos",
    "Blocks whose token at this position was accepted",
    "model_name position",
)

ROUTER = (
    ANSWERS,
    CALLER_ANSWERS,
    CALLER_TOKENS,
    RUNNING,
    PROMPT_TOKENS,
    CACHED_PROMPT_TOKENS,
    TOKENS,
    ROUNDS,
    UNDRAFTED,
    DRAFTED,
    ACCEPTED,
    ACCEPTED_AT,
    JUDGED,
    DEFERRED,
    LOST_MASS,
    DIVERGENCE,
    UNMEASURED,
    BUDGETS,
    PREDICTED,
    PASSES,
    PASS_S,
    PRICE,
    WAITED_S,
    BYTES,
    SUSPECTS,
    FAILOVERS,
    ANSWER_S,
    FIRST_TOKEN_S,
    TOKEN_S,
    ROUND_TRIP_S,
    VLLM_DRAFTS,
    VLLM_DRAFT_TOKENS,
    VLLM_ACCEPTED,
    VLLM_ACCEPTED_AT,
)

# What an engine does: reported by each replica of a tier every few seconds.

ENGINE_PASSES = _counter("cascade_engine_passes", "Forward passes", "tier")
ENGINE_TOKENS = _counter("cascade_engine_tokens", "Tokens run through the model", "tier")
ENGINE_TURNS = _counter(
    "cascade_engine_turns",
    "Sessions in forward passes; divided by passes, the mean batch size",
    "tier",
)
ENGINE_WAITS = _counter("cascade_engine_waits", "Requests whose first pass has begun", "tier")
ENGINE_WAITED_S = _counter(
    "cascade_engine_waited_seconds",
    "Seconds that requests waited for their first pass; divided by waits, the mean queue time",
    "tier",
)
ENGINE_QUEUED_TOKENS = _counter(
    "cascade_engine_queued_tokens",
    "Tokens that waited when a pass was scheduled; divided by passes, the mean backlog",
    "tier",
)
ENGINE_PREFIX_HITS = _counter(
    "cascade_engine_prefix_hits", "Sessions that began with cached tokens", "tier"
)
ENGINE_PREFIX_TOKENS = _counter(
    "cascade_engine_prefix_tokens", "Tokens found in the prefix cache", "tier"
)
ENGINE_PREEMPTIONS = _counter(
    "cascade_engine_preemptions", "KV caches of open sessions evicted to make room", "tier"
)
ENGINE_BUSY = _gauge(
    "cascade_engine_busy_ratio",
    "Share of about the last ten seconds spent in forward passes",
    "tier",
)
ENGINE_WAITING = _gauge("cascade_engine_waiting", "Requests not answered yet", "tier")
ENGINE_SESSIONS = _gauge("cascade_engine_sessions", "Open sessions", "tier")
ENGINE_LEASES = _gauge("cascade_engine_leases", "Leases held", "tier")
ENGINE_BUDGET = _gauge("cascade_engine_budget_tokens", "Token budget of one forward pass", "tier")
CACHE_TOKENS = _gauge(
    "cascade_engine_cache_tokens",
    "Tokens in the KV cache: live (of open sessions), idle (kept for prefix reuse) or free",
    "tier state",
)

ENGINE = (
    ENGINE_PASSES,
    ENGINE_TOKENS,
    ENGINE_TURNS,
    ENGINE_WAITS,
    ENGINE_WAITED_S,
    ENGINE_QUEUED_TOKENS,
    ENGINE_PREFIX_HITS,
    ENGINE_PREFIX_TOKENS,
    ENGINE_PREEMPTIONS,
    ENGINE_BUSY,
    ENGINE_WAITING,
    ENGINE_SESSIONS,
    ENGINE_LEASES,
    ENGINE_BUDGET,
    CACHE_TOKENS,
)
