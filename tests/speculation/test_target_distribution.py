"""The target distribution of every rule: worked examples, golden records, properties."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import enumeration
from tests.support.bigram_models import draft_stats_of

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
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.sampling.penalties import Context
from cascade.sampling.probs import process
from cascade.speculation.target_distribution import (
    RuleInputs,
    TargetDistribution,
    target_distribution,
)
from cascade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from cascade.rules import Rule

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden.json").read_text(encoding="utf-8")
)

A_Q, A_P = (0.5, 0.3, 0.15, 0.05), (0.2, 0.45, 0.3, 0.05)

# Example A by hand: rule, pi, accept, residual, P(reject). The printed numbers have four places.
WORKED: list[tuple[Rule, Sequence[float], Sequence[float], Sequence[float], float]] = [
    (Lossless(), A_P, (0.4, 1, 1, 1), (0, 0.5, 0.5, 0), 0.3),
    (
        Lossy(alpha=0.4),
        (0.3333, 0.3833, 0.2333, 0.05),
        (0.6667, 1, 1, 1),
        (0, 0.5, 0.5, 0),
        0.1667,
    ),
    (
        Lossy(alpha=0.4, beta="solved"),
        (0.3333, 0.37, 0.2467, 0.05),
        (0.6667, 1, 1, 1),
        (0, 0.42, 0.58, 0),
        0.1667,
    ),
    (Chow(alpha=0.4), A_P, (0.4, 1, 1, 1), (0, 0.5, 0.5, 0), 0.3),
    (Chow(alpha=0.55), A_Q, (1, 1, 1, 1), (0, 0, 0, 0), 0),
    (Diff(alpha=-0.1), A_P, (0.4, 1, 1, 1), (0, 0.5, 0.5, 0), 0.3),
    (Diff(alpha=0.1), A_Q, (1, 1, 1, 1), (0, 0, 0, 0), 0),
    (Opt(alpha=-0.3), A_P, (0.4, 1, 1, 1), (0, 0.5, 0.5, 0), 0.3),
    (Opt(alpha=0), A_Q, (1, 1, 1, 1), (0, 0, 0, 0), 0),
    (
        TokenV1(alpha=0.2),
        (0.54, 0.39, 0.06, 0.01),
        (1, 1, 0.4, 0.2),
        (0.3077, 0.6923, 0, 0),
        0.13,
    ),
    (
        TokenV2(alpha=0.2),
        (0.11, 0.5475, 0.315, 0.0275),
        (0.22, 1, 1, 0.55),
        (0, 0.6, 0.4, 0),
        0.4125,
    ),
    (TokenV3(alpha=0), (0.14, 0.615, 0.21, 0.035), (0.28, 1, 1, 0.7), (0, 0.84, 0.16, 0), 0.375),
    (
        TokenV3(alpha=0.6),
        (0.51, 0.3225, 0.165, 0.0025),
        (1, 1, 1, 0.05),
        (0.2105, 0.4737, 0.3158, 0),
        0.0475,
    ),
    (Ensemble(weight=0.7), (0.29, 0.405, 0.255, 0.05), (0.58, 1, 1, 1), (0, 0.5, 0.5, 0), 0.21),
]

MAKERS: dict[str, Callable[[float], Rule]] = {
    "lossless": lambda _: Lossless(),
    "lossy_beta_one": lambda alpha: Lossy(alpha=alpha),
    "lossy_beta_solved": lambda alpha: Lossy(alpha=alpha, beta="solved"),
    "ensemble": lambda alpha: Ensemble(weight=alpha),
    "typical": lambda _: Typical(),
    "chow": lambda alpha: Chow(alpha=alpha),
    "diff": lambda alpha: Diff(alpha=alpha),
    "opt": lambda alpha: Opt(alpha=alpha),
    "chow_log": lambda alpha: ChowLog(alpha=alpha),
    "diff_log": lambda alpha: DiffLog(alpha=alpha),
    "opt_log": lambda alpha: OptLog(alpha=alpha),
    "bild": lambda alpha: Bild(alpha=alpha),
    "fuzzy": lambda alpha: Fuzzy(alpha=alpha),
    "token_v1": lambda alpha: TokenV1(alpha=alpha),
    "token_v2": lambda alpha: TokenV2(alpha=alpha),
    "token_v3": lambda alpha: TokenV3(alpha=alpha),
}


def named(records: Sequence[dict[str, Any]]) -> list[Any]:
    return [pytest.param(r, id=f"{r['rule']}-{i}") for i, r in enumerate(records)]


ALL_RULES: tuple[Rule, ...] = (*enumeration.RULES, Lossy(alpha=0.3137, beta="solved"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The target distribution at one drafted position, and what follows from it."""

    pi: Tensor
    accept: Tensor
    residual: Tensor
    reject: float


def rule_inputs(
    q: Sequence[float],
    p: Sequence[float],
    *,
    q0: Sequence[float] | None = None,
    p0: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> RuleInputs:
    """Return rule inputs of one row on the whole vocabulary."""
    stats = draft_stats_of(q0 or q)
    raw = torch.tensor([p0 or p], dtype=dtype)
    return RuleInputs(
        q_NK=torch.tensor([q], dtype=dtype),
        p_NK=torch.tensor([p], dtype=dtype),
        draft_stats_N=(stats,),
        q0_NK=torch.tensor([q0 or q], dtype=dtype),
        p0_NK=raw,
        p0_max_N=raw.amax(dim=1),
        p0_entropy_N=torch.special.entr(raw).sum(dim=1),
        p0_at_argmax_N=raw[:, stats.argmax],
    )


def judged(rule: Rule, q: Sequence[float], p: Sequence[float]) -> Judged:
    pi = target_distribution(rule, rule_inputs(q, p)).on_NK[0]
    q_V = torch.tensor(q, dtype=torch.float64)
    over = (pi - q_V).clamp_min(0)
    over = torch.where(over > 1e-12, over, 0)
    residual = over / over.sum() if over.sum() else over
    reject = float((q_V - pi).clamp_min(0).sum())
    accept = torch.where(q_V > 0, pi / q_V, 1).clamp_max(1)
    return Judged(pi=pi, accept=accept, residual=residual, reject=reject)


def same_distribution(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return bool(torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=1e-6))


@pytest.mark.parametrize(("rule", "pi", "accept", "residual", "reject"), WORKED)
def test_the_worked_example(
    rule: Rule,
    pi: Sequence[float],
    accept: Sequence[float],
    residual: Sequence[float],
    reject: float,
) -> None:
    """Example A, all columns, to the four places printed."""
    found = judged(rule, A_Q, A_P)
    assert found.pi.tolist() == pytest.approx(pi, abs=6e-5)
    assert found.accept.tolist() == pytest.approx(accept, abs=6e-5)
    assert found.residual.tolist() == pytest.approx(residual, abs=6e-5)
    assert found.reject == pytest.approx(reject, abs=6e-5)


def test_the_docstring_example() -> None:
    """`TokenV3(alpha=.4)` on example A."""
    found = target_distribution(TokenV3(alpha=0.4), rule_inputs(A_Q, A_P))
    assert found.on_NK[0].tolist() == pytest.approx([0.11, 0.5475, 0.315, 0.0275])


@pytest.mark.parametrize("record", named(GOLDEN))
def test_the_golden_records(record: dict[str, Any]) -> None:
    """Decision, pi, acceptance, residual and rejection of every record."""
    rule: Rule = MAKERS[record["rule"]](record.get("alpha", 0.0))
    found = target_distribution(
        rule, rule_inputs(record["q"], record["p"], q0=record.get("q0"), p0=record.get("p0"))
    )
    assert found.on_NK[0].tolist() == pytest.approx(record["pi"], abs=1e-9)
    if record.get("r", "-") != "-":
        assert found.deferred_NK is not None
        decisions = found.deferred_NK[0].int().tolist()
        assert decisions == (record["r"] if isinstance(record["r"], list) else [record["r"]])
    if "accept" in record:
        counted = judged(rule, record["q"], record["p"])
        assert counted.accept.tolist() == pytest.approx(record["accept"], abs=1e-9)
        assert counted.residual.tolist() == pytest.approx(record["residual"], abs=1e-9)
        assert counted.reject == pytest.approx(record["reject_prob"], abs=1e-9)


@pytest.mark.parametrize("record", named([r for r in GOLDEN if "T" in r]))
def test_the_golden_q_and_p_are_processed_from_q0_and_p0(record: dict[str, Any]) -> None:
    """With the temperature, top-k and top-p of the record."""
    sampling = SamplingParams(temperature=record["T"], top_k=record["top_k"], top_p=record["top_p"])
    for raw, row in (("q0", "q"), ("p0", "p")):
        logits_NV = torch.tensor([record[raw]], dtype=torch.float64).log()
        probs = process(logits_NV, [sampling], [Context()])
        assert probs.dense()[0].tolist() == pytest.approx(record[row], abs=1e-9)


def test_plausible_mistakes_have_other_distributions() -> None:
    """Five wrong variants of token_v3 and chow that these tests tell apart from the right ones."""
    right = target_distribution(TokenV3(alpha=0.4), rule_inputs(A_Q, A_P)).on_NK[0].tolist()
    kept = [0, 1, 1, 0]
    q, p = torch.tensor(A_Q), torch.tensor(A_P)
    eta = float((q * (1 - torch.tensor(kept))).sum())
    accept = torch.where(torch.tensor(kept).bool(), 1.0, (eta * p / q).clamp_max(1))
    rejected = float((q * (1 - accept)).sum())
    ordinary = torch.where(torch.tensor(kept).bool(), 1.0, (p / q).clamp_max(1))
    over = (p - q).clamp_min(0) / (p - q).clamp_min(0).sum()
    wrong = {
        "accept in the set, else verify against p": (
            q * ordinary + float((q * (1 - ordinary)).sum()) * over,
            [0.2, 0.45, 0.3, 0.05],
        ),
        "restrict and renormalise q": (
            q * torch.tensor(kept) / (q * torch.tensor(kept)).sum(),
            [0, 0.6667, 0.3333, 0],
        ),
        "reject into p": (q * accept + rejected * p, [0.1925, 0.4856, 0.2737, 0.0481]),
        "reject into norm((p - q)+)": (
            q * accept + rejected * over,
            [0.11, 0.5062, 0.3562, 0.0275],
        ),
    }
    assert same_distribution(right, [0.11, 0.5475, 0.315, 0.0275])
    for name, (probs, printed) in wrong.items():
        assert probs.tolist() == pytest.approx(printed, abs=6e-5), name
        assert not same_distribution(right, probs.tolist()), name
    kept_by_chow = target_distribution(Chow(alpha=0.55), rule_inputs(A_Q, A_P)).on_NK[0].tolist()
    assert same_distribution(kept_by_chow, A_Q)
    assert not same_distribution(kept_by_chow, [1.0, 0, 0, 0]), "an argmax draft does not follow q"


def test_token_v3_at_0_is_not_lossless() -> None:
    """q = [.7, .3], p = [.4, .6] gives [.28, .72]."""
    found = target_distribution(TokenV3(alpha=0), rule_inputs((0.7, 0.3), (0.4, 0.6)))
    assert found.on_NK[0].tolist() == pytest.approx([0.28, 0.72])


weights = st.lists(st.floats(1e-6, 1), min_size=5, max_size=5)

alphas = st.floats(0, 1)


def normed(values: Sequence[float]) -> list[float]:
    return [v / sum(values) for v in values]


@given(q=weights, p=weights)
def test_two_token_rules_are_lossless_if_all_tokens_defer(q: list[float], p: list[float]) -> None:
    """`token_v1` at alpha -1 and `token_v2` below 0: pi = p."""
    for rule in (TokenV1(alpha=-1), TokenV2(alpha=-1e-9)):
        found = target_distribution(rule, rule_inputs(normed(q), normed(p)))
        assert found.on_NK[0].tolist() == pytest.approx(normed(p))


@given(q=weights, p=weights, low=alphas, high=alphas)
def test_four_rules_reject_less_as_alpha_grows(
    q: list[float], p: list[float], low: float, high: float
) -> None:
    """chow, diff, opt and lossy are monotone at every position."""
    low, high = sorted((low, high))
    for kind in (Chow, Diff, Opt):
        wide = judged(kind(alpha=high), normed(q), normed(p)).reject
        assert wide <= judged(kind(alpha=low), normed(q), normed(p)).reject + 1e-12
    for beta in ("one", "solved"):
        reject = [
            judged(Lossy(alpha=min(a, 0.99), beta=beta), normed(q), normed(p)).reject
            for a in (low, high)
        ]
        assert reject[1] <= reject[0] + 1e-9


def test_token_v3_is_not_monotone() -> None:
    """A small alpha makes pi sharper than p, and can accept less than lossless does."""
    rejections = [judged(TokenV3(alpha=a), A_Q, A_P).reject for a in (0, 0.4, 0.6)]
    assert rejections[1] > rejections[0] > judged(Lossless(), A_Q, A_P).reject > rejections[2]


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
@settings(max_examples=30)
@given(q=weights, p=weights)
def test_every_target_distribution_sums_to_one(rule: Rule, q: list[float], p: list[float]) -> None:
    """And is nowhere negative."""
    pi = target_distribution(rule, rule_inputs(normed(q), normed(p))).on_NK[0]
    assert bool((pi >= 0).all())
    assert float(pi.sum()) == pytest.approx(1)


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
@settings(max_examples=30)
@given(q=weights, p=weights)
def test_a_sparse_support_gives_the_same_target_as_the_vocabulary(
    rule: Rule, q: list[float], p: list[float]
) -> None:
    """With q on three of five tokens, pi there and a multiple of p elsewhere make up pi."""
    sparse_q = normed([*q[:3], 0, 0])
    whole = rule_inputs(sparse_q, normed(p))
    sparse = replace(
        whole,
        q_NK=whole.q_NK[:, :3],
        p_NK=whole.p_NK[:, :3],
        q0_NK=None if whole.q0_NK is None else whole.q0_NK[:, :3],
        p0_NK=None if whole.p0_NK is None else whole.p0_NK[:, :3],
    )
    dense, some = target_distribution(rule, whole), target_distribution(rule, sparse)
    expanded = torch.cat([some.on_NK, some.tail_N[:, None] * whole.p_NK[:, 3:]], dim=1)
    torch.testing.assert_close(expanded, dense.on_NK, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
@settings(max_examples=30)
@given(
    q=st.lists(st.sampled_from([0.0, 1e-38, 1e-30, 1e-7, 0.5, 1.0]), min_size=5, max_size=5),
    p=st.lists(st.sampled_from([0.0, 1e-38, 1e-30, 1e-7, 0.5, 1.0]), min_size=5, max_size=5),
)
def test_extreme_probabilities_give_no_nan(rule: Rule, q: list[float], p: list[float]) -> None:
    """Zeros, masses of 1e-38 and one-hots: pi stays finite and sums to one."""
    if not (sum(q) > 0 < sum(p)):
        return
    found: TargetDistribution = target_distribution(
        rule, rule_inputs(normed(q), normed(p), dtype=torch.float32)
    )
    assert bool(found.on_NK.isfinite().all())
    assert bool(found.tail_N.isfinite().all())
    assert float(found.on_NK.sum()) == pytest.approx(1, abs=1e-5)
