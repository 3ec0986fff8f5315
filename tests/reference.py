"""The slow reference: the same cascade without cache, batch or network, dense, in float64.

It uses the same random numbers and the same sparse q as the fast path, so it must write the same
tokens. A model is a function from all tokens so far to one row of logits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import regex
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
from cascade.speculation.modes import VerifyWhen, plan_for
from cascade.speculation.payload import (
    MAX_LOST,
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
class PositionProbs:
    """The distributions at one position, float64 [V]: processed and unscaled, of both models."""

    position: int
    q: Tensor
    p: Tensor
    q0: Tensor
    p0: Tensor
    follows: bool = True  # the rule; else p, because the divergence budget is spent


def processed(
    logits: Tensor, sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Return the processed probabilities of one row of logits."""
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


def masked(logits: Tensor, policy: DecodingParams, answer: Sequence[int]) -> Tensor:
    """Return logits that are -inf where the constraints allow no token."""
    allowed = [may_follow(policy, answer, token) for token in range(len(logits))]
    if not any(allowed):  # then the answer ends, if it can
        allowed = [token in policy.stop_ids or not policy.stop_ids for token in range(len(logits))]
    return logits.masked_fill(~torch.tensor(allowed), -math.inf)


def may_follow(policy: DecodingParams, answer: Sequence[int], token: int) -> bool:
    """Return whether the constraints allow a token after an answer."""
    constraints, text = policy.constraints, (*answer, token)
    if policy.grammar is not None and not _matches(policy, answer, token):
        return False
    return not (
        (constraints.allowed_ids and token not in constraints.allowed_ids)
        or (token in policy.stop_ids and len(answer) < constraints.min_tokens)
        or any(text[-len(word) :] == word for word in constraints.bad_words)
    )


def _matches(policy: DecodingParams, answer: Sequence[int], token: int) -> bool:
    """Return whether a token may follow in a text that matches a regular expression.

    The tokens are the letters from A on.
    """
    assert policy.grammar is not None, "asked for policies that have one"
    ends = token in policy.stop_ids
    text = "".join(chr(0x41 + one) for one in (answer if ends else (*answer, token)))
    return regex.fullmatch(policy.grammar.text, text, partial=not ends) is not None


def _truncated(row: Tensor, sampling: SamplingParams) -> Tensor:
    """Return probabilities after top-k, top-p and min-p, each on what the one before kept."""
    if 0 < sampling.top_k < len(row):
        row = row * (row >= row.sort(descending=True).values[sampling.top_k - 1])
    if sampling.top_p < 1:
        ordered = (row / row.sum()).sort(descending=True).values
        last = int((ordered.cumsum(0) < sampling.top_p).sum())
        row = row * (row / row.sum() >= ordered[last])
    row = row * (row >= sampling.min_p * row.max())
    return row / row.sum()


def as_sent(q: Tensor, policy: DecodingParams) -> Tensor:
    """Return q as it is sampled and sent: cut, in float16, normalised."""
    weights = (q * (2.0**15 / q.max())).half()
    if policy.rows is RowFormat.SPARSE or (
        policy.rows is RowFormat.AUTO and isinstance(policy.rule, Lossless)
    ):
        if policy.row_entries < len(q):
            likely = q >= q.sort(descending=True).values[policy.row_entries - 1]
            weights = weights * (likely & (weights >= 2.0**3))
    elif policy.rows is RowFormat.AUTO:
        weights = _without_tail(weights)
    return weights.double() / weights.double().sum()


def _without_tail(weights: Tensor) -> Tensor:
    """Return weights without the lightest classes; those of a class share two bits of mantissa."""
    mantissas, exponents = weights.double().frexp()
    classes = exponents.double() + (mantissas * 8).floor() / 8
    least = next(
        c
        for c in classes.unique(sorted=True)
        if weights.double()[classes <= c].sum() > MAX_LOST * weights.double().sum()
    )
    return weights * (classes >= least)


def inverse_cdf(weights: Tensor, uniform: float) -> int:
    """Return the first token at which the cumulated weights exceed the number."""
    cumulated = weights.cumsum(0)
    return int((cumulated <= uniform * cumulated[-1]).sum().clamp_max(len(weights) - 1))


def target_distribution(rule: Rule, at: PositionProbs) -> tuple[Tensor, Tensor]:
    """Return pi = T(q, p) and which tokens are deferred, both [V]."""
    q, p, q0, p0 = at.q, at.p, at.q0, at.p0
    rule = rule if at.follows else Lossless()
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
    """Return r of the position rules: whether they defer."""
    max_q, max_p, distance = float(q0.max()), float(p0.max()), float((p - q).clamp_min(0).sum())
    match rule:
        case Chow(alpha=alpha):
            deferred = max_q < 1 - alpha
        case Diff(alpha=alpha):
            deferred = max_q < max_p - alpha
        case Opt(alpha=alpha):
            deferred = max_q < max_p - alpha * distance
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
    """Return the entropy of a distribution in nats."""
    return float(torch.special.entr(row).sum())


Model: TypeAlias = Callable[[Sequence[int]], Tensor]

Token: TypeAlias = tuple[int, Origin]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPair:
    """Two models, a prompt and the decoding parameters."""

    prompt: tuple[int, ...]
    drafter: Model
    expert: Model
    policy: DecodingParams
    divergences: list[float] = field(default_factory=list[float])  # of the tokens so far
    spent: set[str] = field(default_factory=set[str])  # "budget" once it is

    def probs_after(self, answer: Sequence[int]) -> PositionProbs:
        """Return the distributions of the token after an answer."""
        z_q, z_p = (
            masked(model([*self.prompt, *answer]), self.policy, answer)
            for model in (self.drafter, self.expert)
        )
        q0, p0 = z_q.double().softmax(0), z_p.double().softmax(0)
        q = processed(z_q.double(), self.policy.sampling, self.prompt, answer)
        p = processed(z_p.double(), self.policy.sampling, self.prompt, answer)
        q = q if self.policy.sampling.greedy else as_sent(q, self.policy)
        q0 = q0.half().double() if payload_spec(self.policy).unscaled_probs else q0
        return PositionProbs(position=len(answer), q=q, p=p, q0=q0, p0=p0)

    def draw(self, weights: Tensor, purpose: Purpose, *, position: int, start: int) -> int:
        """Return the token that the random numbers choose."""
        if is_gumbel(self.policy):
            noise_1V = rng.gumbel_noise([self.policy.seed], [position], len(weights), "cpu")
            return int((weights.log() + noise_1V[0].double()).argmax())
        return inverse_cdf(weights, self.uniform(purpose, position=position, start=start))

    def uniform(self, purpose: Purpose, *, position: int, start: int) -> float:
        """Return the number of a position; in block verification of a position and its block."""
        starts = [start] if is_blockwise(self.policy) else None
        return float(rng.uniforms([self.policy.seed], [position], purpose, block_starts_N=starts))

    def has_ended(self, tokens: Sequence[int]) -> bool:
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
        mode: Who drafts and who verifies.
        draft_tokens: Length of every block, if the budget allows it.
        max_tokens: Length of the answer if no stop token ends it.
        patience: When a sequence cascade keeps the drafter's answer.
    """
    pair = ModelPair(
        prompt=tuple(prompt), drafter=drafter, expert=expert, policy=plan_for(mode, policy).params
    )
    if mode is Mode.SEQUENCE_CASCADE:
        drafted = _write(pair, Mode.DRAFTER_ONLY, 0, max_tokens)
        if (
            confidence(pair, drafted, patience or SequenceCascadeParams())
            >= (patience or SequenceCascadeParams()).threshold
        ):
            return drafted
        pair = replace(pair, policy=plan_for(Mode.EXPERT_ONLY, policy).params)
        return _write(pair, Mode.EXPERT_ONLY, 0, max_tokens)
    return _write(pair, mode, draft_tokens, max_tokens)


def _write(pair: ModelPair, mode: Mode, draft_tokens: int, max_tokens: int) -> list[Token]:
    """Return the answer: round after round until it ends."""
    text: list[Token] = []
    while len(text) < max_tokens and not pair.has_ended([token for token, _ in text]):
        answer = [token for token, _ in text]
        budget = max_tokens - len(text)
        match mode:
            case Mode.EXPERT_ONLY:
                text += verified_round(pair, answer, length=0)
            case Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
                text += [draft_token(pair, answer)]
            case Mode.SPECULATIVE | Mode.CASCADE if (
                plan_for(mode, pair.policy).verify is VerifyWhen.ALWAYS
            ):
                text += verified_round(
                    pair, answer, length=min(draft_tokens, budget - expert_slots(pair.policy))
                )
            case Mode.TOKEN_CASCADE | Mode.SPECULATIVE | Mode.CASCADE:
                text += (
                    [draft_token(pair, answer)]
                    if keeps_draft(pair, answer)
                    else verified_round(pair, answer, length=0)
                )
    return text[:max_tokens]


def draft_token(pair: ModelPair, answer: Sequence[int]) -> Token:
    """Return the token that the drafter writes without verification."""
    start, at = len(answer), pair.probs_after(answer)
    return pair.draw(at.q, Purpose.DRAFT, position=start, start=start), Origin.KEPT


def keeps_draft(pair: ModelPair, answer: Sequence[int]) -> bool:
    """Return whether the rule keeps the drafter at this position."""
    at = pair.probs_after(answer)
    return not defers(pair.policy.rule, at.q, at.p, at.q0, at.p0)


def verified_round(pair: ModelPair, answer: Sequence[int], *, length: int) -> list[Token]:
    """Return what one round commits: the accepted tokens, and one of the expert's."""
    start, tokens, positions = len(answer), list[int](), list[PositionProbs]()
    while len(tokens) < length and not pair.has_ended(tokens):
        positions.append(pair.probs_after([*answer, *tokens]))
        last = positions[-1]
        tokens.append(pair.draw(last.q, Purpose.DRAFT, position=last.position, start=start))
    positions.append(pair.probs_after([*answer, *tokens]))
    positions = _within_budget(pair, positions)
    text = _verified(pair, tokens, positions)
    _record_divergence(pair, tokens, positions[: len(text)])
    return text


def _within_budget(pair: ModelPair, positions: Sequence[PositionProbs]) -> list[PositionProbs]:
    """Return the positions of a block with what is left of the divergence budget at each."""
    budget = pair.policy.divergence_budget
    if budget is None:
        return list(positions)
    spent, found = math.fsum(pair.divergences), list[PositionProbs]()
    for at in positions:
        spent += divergence(pair.policy.rule, at)
        found.append(replace(at, follows=not pair.spent and spent <= budget + 1e-7))
    return found


def divergence(rule: Rule, at: PositionProbs) -> float:
    """Return the total variation between what is followed and the expert's distribution."""
    return float((target_distribution(rule, at)[0] - at.p).clamp_min(0).sum())


def _record_divergence(
    pair: ModelPair, drafted: Sequence[int], committed: Sequence[PositionProbs]
) -> None:
    """Record the divergence of the tokens that a round commits; one after its block may have 0."""
    judged = len(drafted) + (pair.policy.bonus is Bonus.TARGET and bool(drafted))
    pair.divergences.extend(
        divergence(pair.policy.rule, at) if index < judged else 0.0
        for index, at in enumerate(committed)
    )
    if not all(at.follows for at in committed[:judged]):
        pair.spent.add("budget")


def _verified(
    pair: ModelPair, tokens: Sequence[int], positions: Sequence[PositionProbs]
) -> list[Token]:
    """Return the accepted tokens of a block, and one of the expert's."""
    start = positions[0].position
    if is_gumbel(pair.policy):
        return verify_gumbel(pair, tokens, positions)
    accepted, weights = (verify_block if is_blockwise(pair.policy) else verify_tokens)(
        pair, tokens, positions
    )
    text = [(token, _origin(pair, token, positions[i], start)) for i, token in enumerate(tokens)]
    if accepted < len(tokens) or _has_bonus(pair, tokens):
        emitted = pair.draw(weights, Purpose.NEXT_TOKEN, position=start + accepted, start=start)
        return [*text[:accepted], (emitted, Origin.EXPERT)]
    return text


def verify_tokens(
    pair: ModelPair, tokens: Sequence[int], positions: Sequence[PositionProbs]
) -> tuple[int, Tensor]:
    """Return how many tokens are accepted one by one, and the weights of the next (Alg. 4)."""
    for i, (token, at) in enumerate(zip(tokens, positions[:-1], strict=True)):
        pi, deferred = target_distribution(pair.policy.rule, at)
        uniform = pair.uniform(Purpose.ACCEPT, position=at.position, start=positions[0].position)
        if sends_ids_only(pair.policy):
            if bool(deferred[token]) and uniform >= at.p[token]:
                rest = at.p.clone().index_fill_(0, torch.tensor(token), 0.0)
                return i, rest if rest.sum() > 0 else at.p
        elif uniform >= pi[token] / at.q[token]:
            return i, _residual(pi, at.q, instead=pi)
    return len(tokens), _bonus_probs(pair, tokens, positions[-1])


def verify_block(
    pair: ModelPair, tokens: Sequence[int], positions: Sequence[PositionProbs]
) -> tuple[int, Tensor]:
    """Return the length of the accepted prefix, and the weights of the next token (2403.10444)."""
    pis = [target_distribution(pair.policy.rule, at)[0] for at in positions]
    factors = [1.0]
    for token, at, pi in zip(tokens, positions[:-1], pis[:-1], strict=True):
        factors.append(min(1.0, factors[-1] * float(pi[token] / at.q[token])))
    accepted, start = 0, positions[0].position
    for i in range(1, len(tokens) + 1):
        accept = factors[i]
        if i < len(tokens) and factors[i] < 1:
            gain = float((factors[i] * pis[i] - positions[i].q).clamp_min(0).sum())
            accept = gain / (gain + 1 - factors[i])
        if pair.uniform(Purpose.ACCEPT, position=start + i - 1, start=start) < accept:
            accepted = i
    if accepted == len(tokens):
        return accepted, _bonus_probs(pair, tokens, positions[-1])
    pi, q = pis[accepted], positions[accepted].q
    return accepted, _residual(factors[accepted] * pi, q, instead=pi)


def verify_gumbel(
    pair: ModelPair, tokens: Sequence[int], positions: Sequence[PositionProbs]
) -> list[Token]:
    """Return the tokens accepted under shared noise, and the one after them."""
    text: list[Token] = []
    start = positions[0].position
    for token, at in zip(tokens, positions[:-1], strict=True):
        pi = (
            at.p if pair.policy.rule == Lossless() else target_distribution(pair.policy.rule, at)[0]
        )
        chosen = pair.draw(pi, Purpose.NEXT_TOKEN, position=at.position, start=start)
        if chosen != token:
            return [*text, (chosen, Origin.EXPERT)]
        own = pair.draw(at.p, Purpose.NEXT_TOKEN, position=at.position, start=start) == token
        text.append((token, Origin.DRAFTER if own else Origin.KEPT))
    if not _has_bonus(pair, tokens):
        return text
    weights, position = _bonus_probs(pair, tokens, positions[-1]), positions[-1].position
    return [
        *text,
        (pair.draw(weights, Purpose.NEXT_TOKEN, position=position, start=start), Origin.EXPERT),
    ]


def _has_bonus(pair: ModelPair, tokens: Sequence[int]) -> bool:
    """Return whether a token follows a fully accepted block."""
    return not tokens or (pair.policy.bonus is not Bonus.NONE and not pair.has_ended(tokens))


def _bonus_probs(pair: ModelPair, tokens: Sequence[int], at: PositionProbs) -> Tensor:
    """Return the distribution of the token after a fully accepted block."""
    wanted = pair.policy.bonus is Bonus.TARGET and bool(tokens)
    return target_distribution(pair.policy.rule, at)[0] if wanted else at.p


def _residual(scaled: Tensor, q: Tensor, *, instead: Tensor) -> Tensor:
    """Return (scaled - q)+, or `instead` if that is zero everywhere."""
    residual = (scaled - q).clamp_min(0)
    return residual if residual.sum() > 0 else instead


def _origin(pair: ModelPair, token: int, at: PositionProbs, start: int) -> Origin:
    """Return whether lossless verification with the same number would accept the token."""
    uniform = pair.uniform(Purpose.ACCEPT, position=at.position, start=start)
    own = pair.policy.rule == Lossless() or uniform < at.p[token] / at.q[token]
    return Origin.DRAFTER if own else Origin.KEPT


def confidence(pair: ModelPair, text: Sequence[Token], patience: SequenceCascadeParams) -> float:
    """Return the drafter's confidence in its answer, in nats per token."""
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
