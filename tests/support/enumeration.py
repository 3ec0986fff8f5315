"""The mathematics in exact rationals, independent of the fast path and of the slow reference.

A distribution is a tuple of `Fraction`; one of texts is a dict from tokens to `Fraction`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

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
from cascade.types import Bonus

if TYPE_CHECKING:
    from collections.abc import Callable

Probs: TypeAlias = tuple[Fraction, ...]

Texts: TypeAlias = dict[tuple[int, ...], Fraction]

# Parameters of rules are floats; no probability under test is equal to one of these.
RULES: tuple[Rule, ...] = (
    Lossless(),
    Lossy(alpha=0.3137),
    Ensemble(weight=0.6271),
    Chow(alpha=0.4519),
    Diff(alpha=0.0517),
    Opt(alpha=0.4217),
    ChowLog(alpha=0.8917),
    DiffLog(alpha=0.0713),
    OptLog(alpha=0.3119),
    Bild(alpha=0.7919),
    Fuzzy(alpha=0.0313),
    TokenV1(alpha=0.1517),
    TokenV2(alpha=0.1517),
    TokenV3(alpha=0.5119),
    Typical(),
)


def norm(weights: tuple[Fraction, ...]) -> Probs:
    total = sum(weights)
    return tuple(w / total for w in weights)


def distance(p: Probs, q: Probs) -> Fraction:
    return sum((max(Fraction(0), a - b) for a, b in zip(p, q, strict=True)), Fraction(0))


def entropy(row: Probs) -> float:
    return -sum(float(x) * math.log(x) for x in row if x > 0)


def unacceptable(rule: Rule, q0: Probs, p0: Probs) -> tuple[bool, ...]:
    top = max(p0)
    match rule:
        case TokenV1(alpha=alpha):
            return tuple(x < top - Fraction(alpha) for x in q0)
        case TokenV2(alpha=alpha):
            return tuple(x < top - Fraction(alpha) for x in p0)
        case TokenV3(alpha=alpha):
            return tuple(x < (1 - Fraction(alpha)) * top for x in p0)
        case Typical(epsilon=epsilon, delta=delta):
            return tuple(x < min(epsilon, delta * math.exp(-entropy(p0))) for x in p0)
        case _:
            raise TypeError(rule)


def defers(rule: Rule, q: Probs, p: Probs, q0: Probs, p0: Probs) -> bool:
    max_q, max_p, apart = max(q0), max(p0), distance(p, q)
    match rule:
        case Chow(alpha=alpha):
            deferred = max_q < 1 - Fraction(alpha)
        case Diff(alpha=alpha):
            deferred = max_q < max_p - Fraction(alpha)
        case Opt(alpha=alpha):
            deferred = max_q < max_p - Fraction(alpha) * apart
        case ChowLog(alpha=alpha):
            deferred = entropy(q0) > alpha
        case DiffLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha
        case OptLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha * float(apart)
        case Bild(alpha=alpha):
            deferred = p0[q0.index(max(q0))] < math.exp(-alpha)
        case Fuzzy(alpha=alpha):
            middle = tuple((a + b) / 2 for a, b in zip(p, q, strict=True))
            deferred = entropy(middle) - (entropy(p) + entropy(q)) / 2 > alpha
        case _:
            raise TypeError(rule)
    return deferred


def target_distribution(rule: Rule, q: Probs, p: Probs, q0: Probs, p0: Probs) -> Probs:
    """Return pi = T(q, p)."""
    pairs = list(zip(q, p, strict=True))
    match rule:
        case Lossless():
            return p
        case Ensemble(weight=weight):
            return tuple(Fraction(weight) * b + (1 - Fraction(weight)) * a for a, b in pairs)
        case Lossy(alpha=alpha, beta="one"):
            lenient = [min(a, b / (1 - Fraction(alpha))) for a, b in pairs]
            left, total = sum(q) - sum(lenient), distance(p, q)
            if not total:
                return q
            over = [left * max(Fraction(0), b - a) / total for a, b in pairs]
            return tuple(x + y for x, y in zip(lenient, over, strict=True))
        case TokenV1() | TokenV2() | TokenV3() | Typical():
            deferred = unacceptable(rule, q0, p0)
            eta = sum((a for a, d in zip(q, deferred, strict=True) if d), Fraction(0))
            return tuple(
                (Fraction(0) if d else a) + eta * b
                for (a, b), d in zip(pairs, deferred, strict=True)
            )
        case _:
            return p if defers(rule, q, p, q0, p0) else q


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPair:
    """Two models on few tokens: q and p after every text."""

    q: Callable[[tuple[int, ...]], Probs]
    p: Callable[[tuple[int, ...]], Probs]
    rule: Rule

    def pi(self, text: tuple[int, ...]) -> Probs:
        q, p = self.q(text), self.p(text)
        return target_distribution(self.rule, q, p, q, p)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetedPair(ModelPair):
    """The rule as long as its divergences are within a budget; from then on the expert."""

    budget: Fraction

    def left(self, text: tuple[int, ...]) -> Fraction:
        """Return what is left of the budget after a text."""
        left = self.budget
        for length in range(len(text)):
            spent = self.divergence(text[:length])
            left = left - spent if spent <= left else Fraction(0)
        return left

    def divergence(self, text: tuple[int, ...]) -> Fraction:
        """Return the total variation between the rule's distribution and the expert's."""
        q, p = self.q(text), self.p(text)
        return distance(target_distribution(self.rule, q, p, q, p), p)

    def pi(self, text: tuple[int, ...]) -> Probs:
        q, p = self.q(text), self.p(text)
        within = self.divergence(text) <= self.left(text)
        return target_distribution(self.rule, q, p, q, p) if within else p


def product(pair: ModelPair, length: int) -> Texts:
    """Return the distribution of answers: the product of pi."""
    texts: Texts = {(): Fraction(1)}
    for _ in range(length):
        texts = {
            (*text, v): mass * x
            for text, mass in texts.items()
            for v, x in enumerate(pair.pi(text))
        }
    return texts


def gen_spec_sample(pair: ModelPair, text: tuple[int, ...], *, drafted: int, bonus: Bonus) -> Texts:
    """Return the distribution of one round after a text: GenSpecSample (Alg. 4), enumerated."""
    out: defaultdict[tuple[int, ...], Fraction] = defaultdict(Fraction)

    def descend(done: tuple[int, ...], mass: Fraction) -> None:
        if len(done) == drafted:
            bonus_probs = {Bonus.EXPERT: pair.p, Bonus.TARGET: pair.pi}.get(bonus)
            if bonus_probs is None:
                out[done] += mass
                return
            for v, x in enumerate(bonus_probs((*text, *done))):
                out[(*done, v)] += mass * x
            return
        q, pi = pair.q((*text, *done)), pair.pi((*text, *done))
        for v, (a, b) in enumerate(zip(q, pi, strict=True)):
            descend((*done, v), mass * min(a, b))
        if rejected := distance(pi, q):
            over = norm(tuple(max(Fraction(0), b - a) for a, b in zip(q, pi, strict=True)))
            for v, x in enumerate(over):
                out[(*done, v)] += mass * rejected * x

    descend((), Fraction(1))
    return {done: mass for done, mass in out.items() if mass}
