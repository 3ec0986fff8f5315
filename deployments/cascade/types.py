"""The types that packages share: requests, sessions, blocks, verdicts and chunks of answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NewType, Protocol, TypeAlias

from annotated_types import Ge, Gt, Le

from cascade.rules import Lossless, Rule

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import numpy as np
    from numpy.typing import NDArray

SessionId = NewType("SessionId", str)

Positive: TypeAlias = Annotated[int, Gt(0)]
Natural: TypeAlias = Annotated[int, Ge(0)]
Seconds: TypeAlias = Annotated[float, Gt(0)]
Divergence: TypeAlias = Annotated[float, Ge(0), Le(1e6)]  # of an answer; of a token at most 1
RepetitionPenalty: TypeAlias = Annotated[float, Ge(1e-6), Le(10)]  # below, logits may overflow


class Mode(StrEnum):
    """How a request is answered; one server offers them all."""

    EXPERT_ONLY = "expert_only"
    DRAFTER_ONLY = "drafter_only"
    SEQUENCE_CASCADE = "sequence_cascade"
    TOKEN_CASCADE = "token_cascade"  # noqa: S105 - no password
    SPECULATIVE = "speculative"
    CASCADE = "cascade"


class Coupling(StrEnum):
    """How the drafted token and the emitted token share their randomness."""

    MAXIMAL = "maximal"  # highest acceptance: 1 - D_TV(pi, q)
    GUMBEL = "gumbel"  # drafter-invariant: the emitted token is argmax(log pi + g)


class Bonus(StrEnum):
    """Which distribution the token after a fully accepted block follows, if there is one."""

    NONE = "none"
    EXPERT = "expert"
    TARGET = "target"


class Verification(StrEnum):
    """How drafted tokens are accepted: one by one, or the longest prefix of the block."""

    TOKEN = "token"  # noqa: S105 - no password
    BLOCK = "block"


class RowFormat(StrEnum):
    """How the drafter's distribution is cut, for sampling, sending and verifying alike."""

    AUTO = "auto"  # the least that is exact
    SPARSE = "sparse"  # to its likeliest tokens
    FULL = "full"  # not at all


class Origin(StrEnum):
    """Who wrote a token."""

    DRAFTER = "d"  # drafted, and lossless verification accepts it too
    KEPT = "k"  # drafted, and kept although lossless verification would reject it
    EXPERT = "e"  # recovered token, bonus token, or decoded without a draft
    FORCED = "f"  # the only token that the session's masks allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What turns a model's logits into processed probabilities.

    Order, after `TokenConstraints`: logit bias, repetition, presence and frequency penalties,
    temperature, top-k, top-p, min-p. Penalties count the tokens of prompt and answer (repetition)
    or of the answer alone (presence, frequency). `temperature` 0 is greedy; `top_k` 0 and `top_p` 1
    truncate nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether all probability is on the argmax."""
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether penalties depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConstraints:
    """Which tokens may follow an answer; `sampling.token_mask` applies it to raw logits.

    A bad word is a sequence of tokens that the answer may not contain: its last token may not
    follow the others.
    """

    min_tokens: int = 0  # of the answer, before which no stop token may follow
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_ids: tuple[int, ...] = ()  # the only tokens that may follow; none: all


class GrammarKind(StrEnum):
    """What the text of a grammar is."""

    JSON_SCHEMA = "json_schema"  # JSON; objects have only the properties that are named
    OPEN_JSON_SCHEMA = "open_json_schema"  # the same, with other properties where none forbids them
    REGEX = "regex"
    EBNF = "ebnf"  # as xgrammar and llama.cpp have it; its rule `root` is the answer
    STRUCTURAL_TAG = "structural_tag"  # JSON of xgrammar: texts in which tags begin grammars


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must match; after that only stop tokens may follow."""

    kind: GrammarKind
    text: str


class Phase(StrEnum):
    """A part of an answer."""

    ANSWER = "answer"
    THINKING = "thinking"
    TOOL = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSwitch:
    """What ends a phase: after these tokens the next one begins."""

    phase: Phase
    tokens: tuple[int, ...]
    next: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRules:
    """The phases of an answer, which `sampling.phases` reads off its tokens."""

    start: Phase = Phase.ANSWER
    switches: tuple[PhaseSwitch, ...] = ()
    rules: tuple[tuple[Phase, Rule], ...] = ()  # in place of the policy's rule
    thinking_tokens: int | None = None  # most tokens of thoughts; after them their end is forced


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingParams:
    """All that determines the distribution of a session's tokens; constant for its lifetime."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraints: TokenConstraints = field(default_factory=TokenConstraints)
    grammar: Grammar | None = None
    rule: Rule = field(default_factory=Lossless)
    phases: PhaseRules | None = None
    coupling: Coupling = Coupling.MAXIMAL
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: int = 64  # tokens that `SPARSE` keeps, and `AUTO` under the lossless rule
    seed: int = 0  # 0 .. 2**63 - 1
    stop_ids: tuple[int, ...] = ()  # committed, and nothing is generated after one of them
    logprobs: int | None = None  # alternatives reported per token; None reports nothing
    # Most divergence of the answer, see `Verdict`; then it follows the expert. None: any.
    divergence_budget: float | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of all parts of the answer."""
        own = () if self.phases is None else self.phases.rules
        return (self.rule, *(rule for _, rule in own))

    @property
    def has_phase_rules(self) -> bool:
        """Whether parts of the answer have a rule of their own."""
        return self.phases is not None and bool(self.phases.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProbs:
    """A distribution on K tokens: the probability of `ids[i]` is `weights[i]` / sum of `weights`.

    If `ids` is empty, there are V weights, one for each token of the vocabulary. The drafter
    samples from the float16 weights, so these probabilities are exactly q.
    """

    ids: NDArray[np.uint32]  # [K], or [0] for the whole vocabulary
    weights: NDArray[np.float16]  # [K] or [V]
    unscaled: NDArray[np.float16] | None = None  # q0 at the same tokens, for rules that read it


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """What rules read of the drafter's unscaled distribution q0 at one position."""

    max_prob: float  # max q0
    argmax: int  # argmax q0
    entropy: float  # H(q0) in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What the drafter proposes at a position: L tokens, and what the rule needs to judge them.

    With bonus `target` the last of L + 1 `draft_probs` and `draft_stats` belongs to the position
    after the block.
    """

    tokens: tuple[int, ...] = ()
    likelihoods: tuple[float, ...] = ()  # q(x_j), processed; 1 at temperature 0
    unscaled: tuple[float, ...] = ()  # q0(x_j)
    draft_stats: tuple[DraftStats, ...] = ()  # L, or L + 1
    draft_probs: tuple[SparseProbs, ...] = ()  # q: L or L + 1, or none if ids are enough
    logprobs: tuple[TokenLogprob, ...] = ()  # of the drafter's q0, if the policy asks
    forced: tuple[bool, ...] = ()  # whether the masks allowed no other token; empty: all did

    @property
    def length(self) -> int:
        """Return L."""
        return len(self.tokens)

    def prefix(self, length: int) -> Block:
        """Return the block's first `length` tokens.

        The distribution is unchanged if the length does not depend on the tokens left out.
        """
        if length >= self.length:
            return self
        after = length + (max(len(self.draft_stats), len(self.draft_probs)) > self.length)
        return Block(
            tokens=self.tokens[:length],
            likelihoods=self.likelihoods[:length],
            unscaled=self.unscaled[:length],
            draft_stats=self.draft_stats[:after],
            draft_probs=self.draft_probs[:after],
            logprobs=self.logprobs[:length],
            forced=self.forced[:length],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The natural log-probability of a token at temperature 1, and the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    drafter: bool = False  # under the drafter's distribution; else under the expert's


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of judging a block: the tokens to commit and who wrote each.

    `tokens` are the first `accepted` of the block, then one recovered or bonus token, unless the
    block ends the answer or there is no bonus. The divergence of a token is the total variation
    between the distribution that it follows and the expert's; None where the expert does not know
    the drafter's distribution, or never saw the token.
    """

    accepted: int
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    judged: int = 0  # drafted positions that the rule decided on
    deferred: int = 0  # of those, how many it deferred to the expert
    logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float | None, ...] = ()  # of each of `tokens`, or of none
    divergence_left: float | None = None  # of the budget after these tokens, if there is one

    def divergence(self, count: int) -> tuple[float, int]:
        """Return that of the first tokens: the sum of what is known, and how many are not."""
        known = [one for one in self.divergences[:count] if one is not None]
        return sum(known), min(count, len(self.tokens)) - len(known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One sequence being generated. Position is the number of committed tokens after the prompt."""

    id: SessionId
    prompt: tuple[int, ...]
    policy: DecodingParams
    tokens: tuple[int, ...] = ()
    origins: tuple[Origin, ...] = ()
    source: tuple[int, ...] = ()  # what an encoder reads; the prompt then begins the answer
    divergence_left: float | None = None  # of the policy's budget, if it has one

    @property
    def position(self) -> int:
        """Return the number of committed tokens."""
        return len(self.tokens)

    @property
    def rule(self) -> Rule:
        """Return the policy's rule, or lossless once the divergence budget is spent."""
        return Lossless() if self.divergence_left == 0 else self.policy.rule

    @property
    def finished(self) -> bool:
        """Whether the last committed token ends the answer."""
        return bool(self.tokens) and self.tokens[-1] in self.policy.stop_ids


def advance(session: Session, verdict: Verdict, *, limit: int) -> Session:
    """Return the session with the verdict's tokens committed, at most `limit` tokens in all."""
    budget = limit - session.position
    return replace(
        session,
        tokens=session.tokens + verdict.tokens[:budget],
        origins=session.origins + verdict.origins[:budget],
        divergence_left=verdict.divergence_left,
    )


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # the model stopped after it called tools


class ExpertLoss(StrEnum):
    """What happens to an answer when no expert is available."""

    FAIL = "fail"
    DRAFTER = "drafter"  # the drafter finishes it, which the statistics report


class DrafterLoss(StrEnum):
    """What happens to an answer while no drafter delivers a draft that its mode can do without."""

    EXPERT = "expert"  # the expert writes alone, which the statistics report
    WAIT = "wait"  # the answer waits for a draft, and fails after a while


class Confidence(StrEnum):
    """What a sequence cascade reads of the drafter's token log-probabilities."""

    MEAN = "mean"
    MINIMUM = "minimum"
    QUANTILE = "quantile"  # the lowest decile


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCascadeParams:
    """A sequence cascade keeps the drafter's answer if confidence >= threshold, in nats."""

    confidence: Confidence = Confidence.MEAN
    threshold: float = -0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request. Requests that wait are served by turns: callers, then connections."""

    name: str = ""  # of the API key, or the host of the peer
    connection: str = ""  # host and port of the peer
    weight: int = 1  # its turns for one of another caller
    has_key: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to generate; `api.build_request` makes it and has validated everything."""

    prompt: tuple[int, ...]  # at least one token; prompt + max_tokens fits the context
    policy: DecodingParams
    mode: Mode = Mode.CASCADE
    max_tokens: int = 16
    draft_tokens: int | None = None  # None lets the server choose
    patience: SequenceCascadeParams = field(default_factory=SequenceCascadeParams)
    prediction: tuple[int, ...] = ()  # tokens that the client expects the answer to begin with
    deadline_s: float | None = None
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL
    on_drafter_loss: DrafterLoss = DrafterLoss.EXPERT
    trace: bool = False  # report every round
    source: tuple[int, ...] = ()  # what an encoder reads; `prompt` then is how answers begin
    name: str = ""  # the request id, for logs
    caller: Caller = field(default_factory=Caller)

    @property
    def client_prompt(self) -> tuple[int, ...]:
        """Return the tokens of the prompt that the client sent."""
        return self.source or self.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of the trace: a block and its verdict."""

    position: int  # of the answer, where the block begins
    drafted: int
    accepted: int
    deferred: int
    tokens: int
    draft_ms: float
    judge_ms: float
    undrafted: str = ""  # why the expert wrote alone, though a draft was wanted
    divergence: float | None = None  # of its tokens; None if it is not known of all


@dataclass(slots=True, kw_only=True)
class Statistics:
    """What an answer cost and who wrote its tokens; updated in place by every round."""

    rounds: int = 0
    drafted: int = 0  # tokens in blocks, and positions that the drafter's own rule deferred
    accepted: int = 0  # drafted tokens that were committed
    judged: int = 0  # of the drafted ones, those that the rule decided on
    deferred: int = 0  # of those, given to the expert
    drafter_tokens: int = 0  # committed tokens by origin
    kept_tokens: int = 0
    expert_tokens: int = 0
    forced_tokens: int = 0
    drafter_passes: int = 0
    expert_passes: int = 0
    predicted_accepted: int = 0  # tokens of the client's prediction
    predicted_rejected: int = 0
    branched_rounds: int = 0  # whose block was drafted in advance on a less likely verdict
    lost_mass: float = 0.0  # of drafters, on tokens that the expert has not; over drafted tokens
    divergence: float = 0.0  # from the expert's distributions, over tokens of which it is known
    unmeasured_tokens: int = 0  # committed ones of which it is not
    spent_budgets: int = 0  # 1: the divergence budget was used up, and the expert followed
    cached_prompt_tokens: int = 0
    drafter_s: float = 0.0  # seconds the router waited for each tier
    expert_s: float = 0.0
    drafter_pass_s: float = 0.0  # seconds of passes of each tier, shared by the tokens in them
    expert_pass_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    failovers: int = 0
    expert_losses: int = 0  # 1: no expert was left, and the drafter finished the answer
    failover_causes: dict[str, int] = field(default_factory=dict)  # "drafter late": 2
    accepted_lengths: list[int] = field(default_factory=list)  # rounds by accepted tokens
    undrafted_rounds: dict[str, int] = field(default_factory=dict)  # by cause: "late": 2
    draft_length_reason: str = ""  # of the last round
    draft_length_reasons: dict[str, int] = field(default_factory=dict)  # of all rounds
    trace: list[Round] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Return the number of committed tokens."""
        drafted = self.drafter_tokens + self.kept_tokens
        return drafted + self.expert_tokens + self.forced_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a second of a replica of each tier costs, in one unit; None where it is not known."""

    drafter: float | None = None
    expert: float | None = None

    def of(self, statistics: Statistics) -> Prices:
        """Return what answers cost of each tier."""
        drafter, expert = self.drafter, self.expert
        return Prices(
            drafter=None if drafter is None else drafter * statistics.drafter_pass_s,
            expert=None if expert is None else expert * statistics.expert_pass_s,
        )

    @property
    def total(self) -> float | None:
        """The sum of what is known; None if nothing is."""
        known = [one for one in (self.drafter, self.expert) if one is not None]
        return sum(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChunk:
    """Tokens committed by one round. The last chunk of an answer has a finish reason."""

    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    drafts: tuple[TokenLogprob, ...] = ()  # what the drafter proposed for the first of them
    accepted: int | None = None  # how many were drafted; None: all that the expert did not write
    finish: FinishReason | None = None
    statistics: Statistics | None = None  # so far; updated in place by later rounds


class Generator(Protocol):
    """What the HTTP and gRPC APIs call; closing the iterator early frees everything."""

    def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the chunks of one answer; raises a CascadeError."""
        ...

    async def score(
        self, tokens: Sequence[int], *, top: int, caller: Caller | None = None
    ) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first, given its past."""
        ...
