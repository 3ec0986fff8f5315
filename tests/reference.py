"""The slow twin: the same cascade with no cache, no batch and no wire, dense, in float64.

Same coins, same truncation of q, so the same tokens as the fast path. A model is a function from
all tokens so far to one row of logits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from cascade.rules import (
    Bild,
    Chow,
    ChowLog,
    Diff,
    DiffLog,
    Ensemble,
    Fuzzy,
    Lossless,
    Lossy,
    Opt,
    OptLog,
    Rule,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.sampling import rng
from cascade.sampling.rng import Purpose
from cascade.speculation.draft_length import expert_slots
from cascade.speculation.modes import accepts_without_expert, policy_in
from cascade.speculation.payload import (
    ProbsPayload,
    is_blockwise,
    is_gumbel,
    payload_spec,
    sends_ids_only,
)
from cascade.types import (
    Bonus,
    Confidence,
    DecodingParams,
    Mode,
    Origin,
    RowFormat,
    SamplingParams,
    SequenceCascadeParams,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The rows of one position, dense float64 [V]: processed and unscaled, of both models."""

    position: int
    q: Tensor
    p: Tensor
    q0: Tensor
    p0: Tensor


def processed(
    logits: Tensor, sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Return the processed row of logits."""
    logits = logits.clone()
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in {*prompt, *answer}:
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(answer):
        times = list(answer).count(token)
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.greedy:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    return _truncated((logits / sampling.temperature).softmax(0), sampling)


def _truncated(row: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the row after top-k, top-p and min-p, each on what the one before left."""
    if 0 < sampling.top_k < len(row):
        row = row * (row >= row.sort(descending=True).values[sampling.top_k - 1])
    if sampling.top_p < 1:
        ordered = (row / row.sum()).sort(descending=True).values
        last = int((ordered.cumsum(0) < sampling.top_p).sum())
        row = row * (row / row.sum() >= ordered[last])
    row = row * (row >= sampling.min_p * row.max())
    return row / row.sum()


def shipped(q: Tensor, policy: DecodingParams) -> Tensor:
    """Return the row as the wire carries it: its top in float16, renormalised."""
    weights = (q / q.max()).half().double()
    if policy.rows is not RowFormat.FULL and policy.row_entries < len(q):
        likely = q >= q.sort(descending=True).values[policy.row_entries - 1]
        weights = weights * (likely & (weights >= 2.0**-12))
    return weights / weights.sum()


def inverted(law: Tensor, coin: float) -> int:
    """Return the first token at which the cumulated law exceeds the coin."""
    cumulated = law.cumsum(0)
    return int((cumulated <= coin * cumulated[-1]).sum().clamp_max(len(law) - 1))


def target(rule: Rule, place: Place) -> tuple[Tensor, Tensor]:
    """Return pi = T(q, p) and which tokens are deferred, both [V]."""
    q, p, q0, p0 = place.q, place.p, place.q0, place.p0
    match rule:
        case Lossless():
            return p, q > p
        case Ensemble(weight=weight):
            return weight * p + (1 - weight) * q, q > p
        case Lossy(alpha=alpha, beta="one"):
            lenient, over = torch.minimum(q, p / (1 - alpha)), (p - q).clamp_min(0)
            share = (q - lenient).sum() / over.sum() if over.sum() > 0 else 0.0
            return lenient + share * over, q > lenient
        case Lossy(alpha=alpha):
            lenient = torch.minimum(q, p / (1 - alpha))
            return _mentored(lenient, p, high=1 / (1 - alpha)), q > lenient
        case TokenV1() | TokenV2() | TokenV3() | Typical():
            deferred = unacceptable(rule, q0, p0)
            return q * ~deferred + p * q[deferred].sum(), deferred
        case _:
            deferred = defers(rule, q, p, q0, p0)
            return (p if deferred else q), torch.full_like(q, deferred).bool()


def _mentored(lenient: Tensor, p: Tensor, *, high: float) -> Tensor:
    """Return max(lenient, p / beta) with the beta that makes it sum to one."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if torch.maximum(lenient, middle * p).sum() < 1:
            low = middle
        else:
            high = middle
    return torch.maximum(lenient, high * p)


def unacceptable(rule: TokenV1 | TokenV2 | TokenV3 | Typical, q0: Tensor, p0: Tensor) -> Tensor:
    """Return r(v) of the token rules: which tokens are not acceptable."""
    match rule:
        case TokenV1(alpha=alpha):
            return q0 < p0.max() - alpha
        case TokenV2(alpha=alpha):
            return p0 < p0.max() - alpha
        case TokenV3(alpha=alpha):
            return p0 < (1 - alpha) * p0.max()
        case Typical(epsilon=epsilon, delta=delta):
            return p0 < min(epsilon, delta * math.exp(-entropy(p0)))


def defers(rule: Rule, q: Tensor, p: Tensor, q0: Tensor, p0: Tensor) -> bool:
    """Return r of the position rules: whether the expert writes here."""
    sure_q, sure_p, distance = float(q0.max()), float(p0.max()), float((p - q).clamp_min(0).sum())
    match rule:
        case Chow(alpha=alpha):
            deferred = sure_q < 1 - alpha
        case Diff(alpha=alpha):
            deferred = sure_q < sure_p - alpha
        case Opt(alpha=alpha):
            deferred = sure_q < sure_p - alpha * distance
        case ChowLog(alpha=alpha):
            deferred = entropy(q0) > alpha
        case DiffLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha
        case OptLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha * distance
        case Bild(alpha=alpha):
            deferred = float(-p0[q0.argmax()].log()) > alpha
        case Fuzzy(alpha=alpha):
            deferred = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 > alpha
        case _:
            raise TypeError(f"{rule.kind} does not decide by position")
    return deferred


def entropy(row: Tensor) -> float:
    """Return the entropy of a row in nats."""
    return float(torch.special.entr(row).sum())


Model: TypeAlias = Callable[[Sequence[int]], Tensor]

Token: TypeAlias = tuple[int, Origin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models and the policy they answer a prompt under."""

    prompt: tuple[int, ...]
    drafter: Model
    expert: Model
    policy: DecodingParams

    def place(self, answer: Sequence[int]) -> Place:
        """Return the rows of the token after an answer."""
        z_q, z_p = self.drafter([*self.prompt, *answer]), self.expert([*self.prompt, *answer])
        q0, p0 = z_q.double().softmax(0), z_p.double().softmax(0)
        q = processed(z_q.double(), self.policy.sampling, self.prompt, answer)
        p = processed(z_p.double(), self.policy.sampling, self.prompt, answer)
        need, rule = payload_spec(self.policy), self.policy.rule
        kept = isinstance(rule, Chow | ChowLog) and not defers(rule, q, p, q0, p0)
        if need.rows is ProbsPayload.ALL or (need.rows is ProbsPayload.DEFERRED and not kept):
            q = q if self.policy.sampling.greedy else shipped(q, self.policy)
        q0 = q0.half().double() if need.row_unscaled else q0
        return Place(position=len(answer), q=q, p=p, q0=q0, p0=p0)

    def draw(self, law: Tensor, purpose: Purpose, *, position: int, start: int) -> int:
        """Return the token that the coins choose from a law."""
        if is_gumbel(self.policy):
            noise = rng.noise([self.policy.seed], [position], len(law), "cpu")[0].double()
            return int((law.log() + noise).argmax())
        return inverted(law, self.coin(purpose, position=position, start=start))

    def coin(self, purpose: Purpose, *, position: int, start: int) -> float:
        """Return the coin of a position; of a position and its block where blocks are verified."""
        starts = [start] if is_blockwise(self.policy) else None
        return float(rng.uniforms([self.policy.seed], [position], purpose, starts_N=starts))

    def ended(self, tokens: Sequence[int]) -> bool:
        """Return whether the last token ends the answer."""
        return bool(tokens) and tokens[-1] in self.policy.stop_ids


def decode(  # noqa: PLR0913 - one parameter for each thing a request says
    prompt: Sequence[int],
    *,
    drafter: Model,
    expert: Model,
    policy: DecodingParams,
    mode: Mode = Mode.CASCADE,
    draft_tokens: int = 4,
    max_tokens: int = 16,
    patience: SequenceCascadeParams | None = None,
) -> list[Token]:
    """Return the tokens of one answer and who wrote each.

    Args:
        prompt: At least one token.
        drafter: From all tokens so far to the drafter's logits of the next.
        expert: The same of the expert.
        policy: As the request has it; the mode's own policy is derived from it.
        mode: Who drafts and who judges.
        draft_tokens: Length of every block that fits the room.
        max_tokens: Length of the answer if no stop token ends it.
        patience: When a sequence cascade keeps the drafter's answer.
    """
    pair = Pair(
        prompt=tuple(prompt), drafter=drafter, expert=expert, policy=policy_in(mode, policy)
    )
    if mode is Mode.SEQUENCE_CASCADE:
        drafted = _write(pair, Mode.DRAFTER_ONLY, 0, max_tokens)
        if (
            confidence(pair, drafted, patience or SequenceCascadeParams())
            >= (patience or SequenceCascadeParams()).threshold
        ):
            return drafted
        pair = replace(pair, policy=policy_in(Mode.EXPERT_ONLY, policy))
        return _write(pair, Mode.EXPERT_ONLY, 0, max_tokens)
    return _write(pair, mode, draft_tokens, max_tokens)


def _write(pair: Pair, mode: Mode, draft_tokens: int, max_tokens: int) -> list[Token]:
    """Return the answer: round after round until it ends."""
    text: list[Token] = []
    while len(text) < max_tokens and not pair.ended([token for token, _ in text]):
        answer = [token for token, _ in text]
        room = max_tokens - len(text)
        match mode:
            case Mode.EXPERT_ONLY:
                text += judged(pair, answer, length=0)
            case Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
                text += [alone(pair, answer)]
            case Mode.SPECULATIVE | Mode.CASCADE if not accepts_without_expert(mode, pair.policy):
                text += judged(
                    pair, answer, length=min(draft_tokens, room - expert_slots(pair.policy))
                )
            case Mode.TOKEN_CASCADE | Mode.SPECULATIVE | Mode.CASCADE:
                text += (
                    [alone(pair, answer)] if keeps(pair, answer) else judged(pair, answer, length=0)
                )
    return text[:max_tokens]


def alone(pair: Pair, answer: Sequence[int]) -> Token:
    """Return the token that the drafter writes unasked."""
    start, place = len(answer), pair.place(answer)
    return pair.draw(place.q, Purpose.DRAFT, position=start, start=start), Origin.KEPT


def keeps(pair: Pair, answer: Sequence[int]) -> bool:
    """Return whether the rule keeps the drafter at this position."""
    place = pair.place(answer)
    return not defers(pair.policy.rule, place.q, place.p, place.q0, place.p0)


def judged(pair: Pair, answer: Sequence[int], *, length: int) -> list[Token]:
    """Return what one round commits: the drafted tokens that stand, and one of the expert's."""
    start, tokens, places = len(answer), list[int](), list[Place]()
    while len(tokens) < length and not pair.ended(tokens):
        places.append(pair.place([*answer, *tokens]))
        law, position = places[-1].q, places[-1].position
        tokens.append(pair.draw(law, Purpose.DRAFT, position=position, start=start))
    places.append(pair.place([*answer, *tokens]))
    if is_gumbel(pair.policy):
        return gumbel(pair, tokens, places)
    accepted, law = (blockwise if is_blockwise(pair.policy) else tokenwise)(pair, tokens, places)
    text = [(token, _origin(pair, token, places[i], start)) for i, token in enumerate(tokens)]
    if accepted < len(tokens) or _has_bonus(pair, tokens):
        emitted = pair.draw(law, Purpose.EMIT, position=start + accepted, start=start)
        return [*text[:accepted], (emitted, Origin.EXPERT)]
    return text


def tokenwise(pair: Pair, tokens: Sequence[int], places: Sequence[Place]) -> tuple[int, Tensor]:
    """Return how many tokens stand one by one, and the law of what follows (Alg. 4)."""
    for i, (token, place) in enumerate(zip(tokens, places[:-1], strict=True)):
        pi, deferred = target(pair.policy.rule, place)
        coin = pair.coin(Purpose.ACCEPT, position=place.position, start=places[0].position)
        if sends_ids_only(pair.policy):
            if bool(deferred[token]) and coin >= place.p[token]:
                rest = place.p.clone().index_fill_(0, torch.tensor(token), 0.0)
                return i, rest if rest.sum() > 0 else place.p
        elif coin >= pi[token] / place.q[token]:
            return i, _residual(pi, place.q, instead=pi)
    return len(tokens), _bonus_law(pair, tokens, places[-1])


def blockwise(pair: Pair, tokens: Sequence[int], places: Sequence[Place]) -> tuple[int, Tensor]:
    """Return how long a prefix of the block stands, and the law of what follows (2403.10444)."""
    laws = [target(pair.policy.rule, place)[0] for place in places]
    factors = [1.0]
    for token, place, pi in zip(tokens, places[:-1], laws[:-1], strict=True):
        factors.append(min(1.0, factors[-1] * float(pi[token] / place.q[token])))
    accepted, start = 0, places[0].position
    for i in range(1, len(tokens) + 1):
        stands = factors[i]
        if i < len(tokens) and factors[i] < 1:
            gain = float((factors[i] * laws[i] - places[i].q).clamp_min(0).sum())
            stands = gain / (gain + 1 - factors[i])
        if pair.coin(Purpose.ACCEPT, position=start + i - 1, start=start) < stands:
            accepted = i
    if accepted == len(tokens):
        return accepted, _bonus_law(pair, tokens, places[-1])
    pi, q = laws[accepted], places[accepted].q
    return accepted, _residual(factors[accepted] * pi, q, instead=pi)


def gumbel(pair: Pair, tokens: Sequence[int], places: Sequence[Place]) -> list[Token]:
    """Return what stands of a block under shared noise, and the token that does not agree."""
    text: list[Token] = []
    start = places[0].position
    for token, place in zip(tokens, places[:-1], strict=True):
        pi = place.p if pair.policy.rule == Lossless() else target(pair.policy.rule, place)[0]
        chosen = pair.draw(pi, Purpose.EMIT, position=place.position, start=start)
        if chosen != token:
            return [*text, (chosen, Origin.EXPERT)]
        own = pair.draw(place.p, Purpose.EMIT, position=place.position, start=start) == token
        text.append((token, Origin.DRAFTER if own else Origin.KEPT))
    if not _has_bonus(pair, tokens):
        return text
    law, position = _bonus_law(pair, tokens, places[-1]), places[-1].position
    return [*text, (pair.draw(law, Purpose.EMIT, position=position, start=start), Origin.EXPERT)]


def _has_bonus(pair: Pair, tokens: Sequence[int]) -> bool:
    """Return whether a token follows a block that stands whole."""
    return not tokens or (pair.policy.bonus is not Bonus.NONE and not pair.ended(tokens))


def _bonus_law(pair: Pair, tokens: Sequence[int], place: Place) -> Tensor:
    """Return the law of the token after a block that stands whole."""
    wanted = pair.policy.bonus is Bonus.TARGET and bool(tokens)
    return target(pair.policy.rule, place)[0] if wanted else place.p


def _residual(scaled: Tensor, q: Tensor, *, instead: Tensor) -> Tensor:
    """Return what the scaled target has over q, or the target if it has nothing."""
    residual = (scaled - q).clamp_min(0)
    return residual if residual.sum() > 0 else instead


def _origin(pair: Pair, token: int, place: Place, start: int) -> Origin:
    """Return whether lossless verification with the same coin would have let the token stand."""
    coin = pair.coin(Purpose.ACCEPT, position=place.position, start=start)
    own = pair.policy.rule == Lossless() or coin < place.p[token] / place.q[token]
    return Origin.DRAFTER if own else Origin.KEPT


def confidence(pair: Pair, text: Sequence[Token], patience: SequenceCascadeParams) -> float:
    """Return how sure the drafter was of its answer, in nats a token."""
    tokens = [token for token, _ in text]
    found = sorted(
        math.log(pair.drafter([*pair.prompt, *tokens[:i]]).double().softmax(0)[token])
        for i, token in enumerate(tokens)
    )
    match patience.confidence:
        case Confidence.MEAN:
            return statistics.fmean(found)
        case Confidence.MINIMUM:
            return found[0]
        case Confidence.QUANTILE:
            return found[len(found) // 10]
