"""Hypothesis strategies for every message of the protocol."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade.protocol import messages
from cascade.rules import Rule
from cascade.types import (
    Block,
    Bonus,
    Coupling,
    DecodingParams,
    DraftStats,
    Origin,
    Phase,
    PhaseRules,
    PhaseSwitch,
    RowFormat,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
    TokenConstraints,
    TokenLogprob,
    Verdict,
    Verification,
)

Value = TypeVar("Value")

TOKENS = st.integers(0, 2**32 - 1)

COUNTS = st.integers(0, 2**31 - 1)

LONGS = st.integers(0, 2**63 - 1)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
BIASES = st.floats(-1e30, 1e30)

PROBABILITIES = st.floats(0, 1)

BUDGETS = st.none() | st.floats(0, 1e6)

LOGPROBS = st.floats(max_value=0)

# Protobuf text is UTF-8, which has no lone surrogates.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=128).map(SessionId)


def several(
    values: st.SearchStrategy[Value], least: int = 0, most: int = 8
) -> st.SearchStrategy[tuple[Value, ...]]:
    return st.lists(values, min_size=least, max_size=most).map(tuple)


def exactly(values: st.SearchStrategy[Value], count: int) -> st.SearchStrategy[tuple[Value, ...]]:
    return several(values, count, count)


@st.composite
def sparse_probs(draw: st.DrawFn) -> SparseProbs:
    """Return a sparse or full distribution, with or without unscaled weights."""
    count = draw(st.integers(1, 6))
    floats = arrays(np.float16, count, elements=st.floats(0, 1, width=16))
    weights = draw(floats)
    weights[draw(st.integers(0, count - 1))] = 1
    width = draw(st.sampled_from((0, count)))
    ids = draw(arrays(np.uint32, width, elements=TOKENS))
    return SparseProbs(
        ids=ids, weights=np.abs(weights), unscaled=draw(st.none() | floats.map(np.abs))
    )


draft_stats = st.builds(DraftStats, max_prob=PROBABILITIES, argmax=TOKENS, entropy=FINITE)

logprobs = st.builds(
    TokenLogprob,
    token=TOKENS,
    logprob=LOGPROBS,
    top=several(st.tuples(TOKENS, LOGPROBS), most=3),
    drafter=st.booleans(),
)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Return a block whose lists are empty, of its length, or one longer where allowed."""
    count = draw(st.integers(0, 4))

    def maybe(values: st.SearchStrategy[Value], *lengths: int) -> tuple[Value, ...]:
        return draw(exactly(values, draw(st.sampled_from((0, *lengths)))))

    return Block(
        tokens=draw(exactly(TOKENS, count)),
        likelihoods=maybe(PROBABILITIES, count),
        unscaled=maybe(PROBABILITIES, count),
        draft_stats=maybe(draft_stats, count, count + 1),
        draft_probs=maybe(sparse_probs(), count, count + 1),
        logprobs=maybe(logprobs, count),
    )


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    """As many origins as tokens."""
    count = draw(st.integers(0, 4))
    reported = draw(st.sampled_from((0, count)))
    return Verdict(
        accepted=draw(COUNTS),
        tokens=draw(exactly(TOKENS, count)),
        origins=draw(exactly(st.sampled_from(Origin), count)),
        judged=draw(COUNTS),
        deferred=draw(COUNTS),
        logprobs=draw(exactly(logprobs, reported)),
        divergences=draw(exactly(st.none() | PROBABILITIES, draw(st.sampled_from((0, count))))),
        divergence_left=draw(BUDGETS),
    )


@st.composite
def sessions(draw: st.DrawFn, *, most_source: int = 0) -> Session:
    """As many origins as tokens."""
    count = draw(st.integers(0, 4))
    return Session(
        id=draw(IDS),
        prompt=draw(several(TOKENS, 1)),
        policy=draw(policies),
        tokens=draw(exactly(TOKENS, count)),
        origins=draw(exactly(st.sampled_from(Origin), count)),
        source=draw(several(TOKENS, most=most_source)),
    )


samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_infinity=False),
    top_k=COUNTS,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=PROBABILITIES,
    repetition_penalty=st.floats(1e-6, 1e30),
    presence_penalty=BIASES,
    frequency_penalty=BIASES,
    logit_bias=several(st.tuples(TOKENS, BIASES)),
)

constraints = st.builds(
    TokenConstraints,
    min_tokens=COUNTS,
    bad_words=several(several(TOKENS, 1), most=3),
    allowed_ids=several(TOKENS, most=4),
)

rules = st.one_of(*(st.from_type(kind) for kind in get_args(Rule)))

switches = st.builds(
    PhaseSwitch,
    phase=st.sampled_from(Phase),
    tokens=st.lists(TOKENS, min_size=1, max_size=3).map(tuple),
    next=st.sampled_from(Phase),
)

phases = st.builds(
    PhaseRules,
    start=st.sampled_from(Phase),
    switches=several(switches),
    rules=several(st.tuples(st.sampled_from(Phase), rules)),
) | st.builds(
    PhaseRules,
    switches=st.just((PhaseSwitch(phase=Phase.THINKING, tokens=(7,), next=Phase.ANSWER),)),
    thinking_tokens=COUNTS,
)

policies = st.builds(
    DecodingParams,
    sampling=samplings,
    constraints=constraints,
    rule=rules,
    phases=st.none() | phases,
    coupling=st.sampled_from(Coupling),
    bonus=st.sampled_from(Bonus),
    verification=st.sampled_from(Verification),
    rows=st.sampled_from(RowFormat),
    row_entries=st.integers(1, 2**31 - 1),
    seed=LONGS,
    stop_ids=several(TOKENS),
    logprobs=st.none() | COUNTS,
    divergence_budget=BUDGETS,
)

ids: dict[str, st.SearchStrategy[Any]] = {"session_id": IDS, "epoch": LONGS}

DIGESTS = st.integers(0, 2**64 - 1)

# Sent as whole microseconds.
DURATIONS = st.integers(0, 10**12).map(lambda microseconds: microseconds / 1e6)

timings = st.builds(
    messages.Timing,
    service_s=DURATIONS,
    step_s=DURATIONS,
    tokens=COUNTS,
    sessions=COUNTS,
    taken_s=DURATIONS,
)

prefixes = ids | {"position": st.integers(8, 2**63 - 1), "digest": DIGESTS}

replies = ids | {"position": LONGS, "cached_prompt_tokens": COUNTS}

STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    DraftStats: draft_stats,
    TokenLogprob: logprobs,
    SparseProbs: sparse_probs(),
    Block: blocks(),
    Verdict: verdicts(),
    DecodingParams: policies,
    Session: sessions(),
    messages.Open: st.builds(
        messages.Open,
        session=sessions(most_source=4),
        epoch=LONGS,
        lease=TEXTS,
        traceparent=TEXTS,
        caller=TEXTS,
        weight=st.integers(1, 2**31 - 1),
    ),
    messages.Propose: st.builds(
        messages.Propose,
        **prefixes,
        count=COUNTS,
        tokens=several(TOKENS),
        until_deferral=st.booleans(),
        ahead=COUNTS,
        floor=PROBABILITIES,
        branches=COUNTS,
    ),
    messages.Judge: st.builds(
        messages.Judge,
        **prefixes,
        block=blocks(),
        tokens=several(TOKENS),
        ahead=COUNTS,
        divergence_left=BUDGETS,
    ),
    messages.Score: st.builds(
        messages.Score, **ids, lease=TEXTS, tokens=several(TOKENS, 1), top=COUNTS
    ),
    messages.Close: st.builds(messages.Close, **ids),
    messages.Proposal: st.builds(
        messages.Proposal,
        **replies,
        digest=DIGESTS,
        block=blocks(),
        deferred=st.booleans(),
        passes=COUNTS,
        timing=timings,
        branched=st.booleans(),
        lost_mass=st.floats(0, 8),
    ),
    messages.Judgement: st.builds(
        messages.Judgement, **replies, digest=DIGESTS, verdict=verdicts(), timing=timings
    ),
    messages.Scores: st.builds(messages.Scores, **ids, logprobs=several(logprobs, most=3)),
    messages.Need: st.builds(messages.Need, **ids, position=LONGS),
    messages.Refusal: st.builds(messages.Refusal, **ids, code=TEXTS, reason=TEXTS, message=TEXTS),
}


def register() -> None:
    """Let `st.from_type` find the strategies."""
    for kind, strategy in STRATEGIES.items():
        st.register_type_strategy(kind, strategy)
