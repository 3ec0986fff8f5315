"""Verdicts: the fast path against the slow reference, and properties of every verdict."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests import reference
from tests.reference import PositionProbs, target_distribution
from tests.support import enumeration
from tests.support.bigram_models import Answer, Bigrams, draft_stats_of

from cascade.rules import Bild, Chow, Diff, Ensemble, Lossless, Lossy, Opt, TokenV1, TokenV3
from cascade.sampling import rng, tensor_ops
from cascade.sampling.token_mask import allowed_bits, allows, constraint_masks
from cascade.speculation.draft_length import expert_slots
from cascade.speculation.verify import VerifyTask, live_length, rows_needed, verify
from cascade.types import (
    Block,
    Bonus,
    Coupling,
    DecodingParams,
    DraftStats,
    Origin,
    RowFormat,
    SamplingParams,
    TokenConstraints,
    Verdict,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.rules import Rule
    from cascade.sampling.token_mask import Bits

VOCAB = 12

PAIR = Bigrams.random(vocab=VOCAB)

ALL_RULES: tuple[Rule, ...] = (*enumeration.RULES, Lossy(alpha=0.3137, beta="solved"))

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=5, min_p=0.05),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logit_bias=((3, 1.0),)),
]

CONSTRAINTS = [
    TokenConstraints(),
    TokenConstraints(min_tokens=6),
    TokenConstraints(bad_words=((3,), (1, 2), (4, 4, 4), (7, 0))),
    TokenConstraints(min_tokens=3, allowed_ids=(0, 1, 2, 4, 5, 8), bad_words=((1, 1), (8, 0))),
]

BUDGETS = [None, 0.3, 1.7, 0.0, None, 0.8, 2.0]

GRID = list(
    itertools.product(ALL_RULES, Coupling, Bonus, Verification, RowFormat, range(len(SAMPLINGS)))
)


def policy_at(index: int) -> DecodingParams:
    """Return one policy of the grid, with its own seed and sometimes a stop token or masks."""
    rule, coupling, bonus, verification, rows, sampling = GRID[index]
    return DecodingParams(
        rule=rule,
        coupling=coupling,
        bonus=bonus,
        verification=verification,
        rows=rows,
        row_entries=6,
        sampling=SAMPLINGS[sampling],
        seed=index * 7919 + 2**33,
        stop_ids=(5,) if index % 3 == 0 else (),
        constraints=CONSTRAINTS[index // len(SAMPLINGS) % len(CONSTRAINTS)],
        divergence_budget=BUDGETS[index % len(BUDGETS)],
    )


def reference_answer(
    prompt: Sequence[int], policy: DecodingParams, *, draft_tokens: int, max_tokens: int
) -> tuple[list[reference.Token], list[float]]:
    """Return what the slow reference writes if every block is judged, and its divergences."""
    pair = reference.ModelPair(
        prompt=tuple(prompt), drafter=PAIR.drafter, expert=PAIR.expert, policy=policy
    )
    text: list[reference.Token] = []
    while len(text) < max_tokens and not pair.has_ended(answer := [token for token, _ in text]):
        budget = max_tokens - len(text) - expert_slots(policy)
        text += reference.verified_round(pair, answer, length=min(draft_tokens, budget))
    return text[:max_tokens], pair.divergences


def assert_fast_equals_slow(indices: Sequence[int]) -> None:
    """Decode many policies in one batch, and each alone with the slow reference."""
    policies = [policy_at(i) for i in indices]
    prompts = [(i % VOCAB, (i // 7) % VOCAB) for i in indices]
    lengths = [i % 6 for i in indices]
    fast = PAIR.answers(policies, prompts, draft_tokens=lengths, max_tokens=14)
    for policy, prompt, length, answer in zip(policies, prompts, lengths, fast, strict=True):
        slow, divergences = reference_answer(prompt, policy, draft_tokens=length, max_tokens=14)
        assert answer.text[:14] == slow, policy
        known = zip(answer.divergences, divergences, strict=True)
        assert all(one is None or one == pytest.approx(two, abs=1e-5) for one, two in known), policy
        if policy.divergence_budget is not None:
            assert None not in answer.divergences
            assert sum(divergences) <= policy.divergence_budget + 1e-5


@pytest.mark.parametrize("chunk", [tensor_ops.CHUNK_SIZE, 1])
def test_the_fast_path_equals_the_slow_reference(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token and origin for origin, with policies mixed in a batch.

    Also where positions are read one by one, as those of a large vocabulary are.
    """
    monkeypatch.setattr(tensor_ops, "CHUNK_SIZE", chunk)
    chosen = random.Random(7).sample(range(len(GRID)), 40)  # noqa: S311 - a fixed choice
    assert_fast_equals_slow(chosen)


@pytest.mark.slow
def test_the_fast_path_equals_the_slow_reference_for_every_policy() -> None:
    """All rules, couplings, bonuses, verifications, formats and sampling parameters."""
    for first in range(0, len(GRID), 120):
        assert_fast_equals_slow(range(first, min(first + 120, len(GRID))))


def judged(
    policy: DecodingParams,
    block: Block,
    rows_NV: torch.Tensor,
    *,
    position: int = 0,
    vocab_limit: int | None = None,
) -> Verdict:
    task = VerifyTask(policy=policy, position=position, block=block)
    return verify(rows_NV, [task], vocab_limit=vocab_limit)[0]


def log_rows(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def full_block(*tokens: int, q: Sequence[float] | None = None) -> Block:
    """Return a greedy block with all that any rule reads; q is the same at every position."""
    q = q or [0.0] * VOCAB
    return Block(
        tokens=tokens,
        likelihoods=(1.0,) * len(tokens),
        unscaled=tuple(q[token] for token in tokens),
        draft_stats=(draft_stats_of(q),) * len(tokens),
    )


@pytest.mark.parametrize(
    ("policy", "tokens", "rows"),
    [
        (DecodingParams(), (), 1),
        (DecodingParams(), (1, 2, 3), 4),
        (DecodingParams(bonus=Bonus.NONE), (1, 2, 3), 3),
        (DecodingParams(bonus=Bonus.NONE), (), 1),
        (DecodingParams(stop_ids=(2,)), (1, 2, 3), 2),
        (DecodingParams(stop_ids=(2,)), (2,), 1),
        (DecodingParams(stop_ids=(9,)), (1, 2), 3),
    ],
)
def test_rows_needed(policy: DecodingParams, tokens: tuple[int, ...], rows: int) -> None:
    """One for each drafted token up to a stop token, and one for the bonus."""
    assert rows_needed(policy, tokens) == rows


def test_nothing_follows_a_stop_token() -> None:
    """A stop token inside a block ends it: later tokens are not judged, and no bonus follows."""
    greedy = DecodingParams(sampling=SamplingParams(temperature=0), stop_ids=(2,))
    assert live_length(greedy, (1, 2, 3)) == 2
    found = judged(greedy, full_block(1, 2, 3), log_rows([0.1, 0.8, 0.1, 0], [0.1, 0.1, 0.8, 0]))
    assert (found.accepted, found.tokens, found.judged) == (2, (1, 2), 2)
    rejected = judged(greedy, full_block(1, 2, 3), log_rows([0.1, 0.8, 0.1, 0], [0.8, 0.1, 0.1, 0]))
    assert (rejected.accepted, rejected.tokens) == (1, (1, 0))


def test_an_empty_block_is_plain_decoding() -> None:
    """Without a draft the token follows p, for every rule and bonus."""
    row_1V = PAIR.expert_VV[:1]
    samples = 3000
    for rule, bonus in ((Lossless(), Bonus.NONE), (Chow(alpha=1), Bonus.TARGET)):
        tasks = [
            VerifyTask(policy=DecodingParams(rule=rule, bonus=bonus, seed=seed), position=0)
            for seed in range(samples)
        ]
        verdicts = verify(row_1V.expand(samples, -1), tasks)
        counts = Counter(verdict.tokens[0] for verdict in verdicts)
        wanted = (row_1V[0].softmax(0) * samples).tolist()
        found = [counts[v] for v in range(VOCAB)]
        assert stats.chisquare(found, [w * samples / sum(wanted) for w in wanted]).pvalue > 1e-3
        assert all(v.accepted == v.judged == 0 for v in verdicts)
        assert all(v.origins == (Origin.EXPERT,) for v in verdicts)


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_batches_of_empty_blocks_are_judged_under_every_policy(rule: Rule) -> None:
    """For every rule, coupling, bonus, verification and temperature."""
    assert verify(torch.empty(0, VOCAB), []) == []
    for coupling, bonus, verification, temperature in itertools.product(
        Coupling, Bonus, Verification, (0.0, 1.0)
    ):
        policy = DecodingParams(
            rule=rule,
            coupling=coupling,
            bonus=bonus,
            verification=verification,
            sampling=SamplingParams(temperature=temperature),
        )
        tasks = [VerifyTask(policy=policy, position=3)] * 2
        verdicts = verify(PAIR.expert_VV[:2], tasks)
        assert [len(verdict.tokens) for verdict in verdicts] == [1, 1]


@pytest.mark.parametrize(
    ("verification", "coupling"),
    [
        (Verification.TOKEN, Coupling.MAXIMAL),
        (Verification.BLOCK, Coupling.MAXIMAL),
        (Verification.TOKEN, Coupling.GUMBEL),
    ],
)
@pytest.mark.parametrize(
    "rule",
    [
        TokenV3(alpha=0.6),
        # The reuse of random numbers does not depend on the rule.
        pytest.param(Lossless(), marks=pytest.mark.slow),
        pytest.param(Opt(alpha=0.3), marks=pytest.mark.slow),
        pytest.param(Chow(alpha=0.55), marks=pytest.mark.slow),
    ],
    ids=lambda rule: rule.kind,
)
def test_sampled_answers_follow_the_product_of_pi(
    rule: Rule, verification: Verification, coupling: Coupling
) -> None:
    """Random numbers of dropped tokens are used again: a chi-square test over several rounds."""
    policy = DecodingParams(
        rule=rule,
        coupling=coupling,
        bonus=Bonus.NONE,
        verification=verification,
        rows=RowFormat.FULL,
    )
    assert p_value(policy, samples=2000) > 1e-4


@pytest.mark.slow
def test_random_numbers_of_dropped_blocks_must_not_be_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block verification with numbers per position only has another distribution."""
    policy = DecodingParams(bonus=Bonus.NONE, verification=Verification.BLOCK, rows=RowFormat.FULL)
    assert p_value(policy, samples=20_000) > 1e-4
    uniforms = rng.uniforms

    def without_starts(
        seeds_N: Sequence[int],
        positions_N: Sequence[int],
        *purposes: rng.Purpose,
        block_starts_N: Sequence[int] | None = None,
    ) -> torch.Tensor:
        del block_starts_N
        return uniforms(seeds_N, positions_N, *purposes)

    monkeypatch.setattr(rng, "uniforms", without_starts)
    assert p_value(policy, samples=20_000) < 1e-4


def p_value(policy: DecodingParams, *, samples: int) -> float:
    """Return how well answers of several rounds fit the product of pi."""
    length, pair = 4, Bigrams.random(vocab=3, seed=4, apart=1.5)
    texts = pair.decode(
        [replace(policy, seed=seed) for seed in range(samples)],
        [(0,)] * samples,
        draft_tokens=[3] * samples,
        max_tokens=length,
    )
    counts = Counter(tuple(token for token, _ in text) for text in texts)
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for position in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, mass in expected.items():
            q, p = (m((0, *text)).double().softmax(0) for m in (pair.drafter, pair.expert))
            pi, _ = target_distribution(
                policy.rule, PositionProbs(position=position, q=q, p=p, q0=q, p0=p)
            )
            longer |= {(*text, v): mass * float(pi[v]) for v in range(3)}
        expected = longer
    likely = [text for text, mass in expected.items() if mass * samples >= 5]
    found = [counts[text] for text in likely]
    wanted = [expected[text] * samples for text in likely]
    found, wanted = [*found, samples - sum(found)], [*wanted, samples - sum(wanted)]
    return float(stats.chisquare(found, wanted).pvalue)


def test_under_gumbel_lossless_text_depends_on_the_expert_alone() -> None:
    """Any drafter, block length, batch and bonus gives the same text."""
    other = Bigrams.random(vocab=VOCAB, seed=99)
    unrelated = Bigrams(drafter_VV=other.drafter_VV, expert_VV=PAIR.expert_VV)
    texts: set[tuple[int, ...]] = set()
    for pair, bonus in itertools.product((PAIR, unrelated), Bonus):
        policy = DecodingParams(
            coupling=Coupling.GUMBEL,
            bonus=bonus,
            seed=2**50 + 1,
            sampling=SamplingParams(temperature=0.8, top_p=0.95),
        )
        lengths = [0, 1, 2, 3, 5, 8, 13]
        found = pair.decode(
            [policy] * len(lengths), [(3,)] * len(lengths), draft_tokens=lengths, max_tokens=20
        )
        texts |= {tuple(token for token, _ in text) for text in found}
    assert len(texts) == 1


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_under_gumbel_the_emitted_token_is_the_argmax_of_the_noisy_target(rule: Rule) -> None:
    """For any draft, a position emits argmax(log pi + g)."""
    policy = DecodingParams(
        rule=rule, coupling=Coupling.GUMBEL, bonus=Bonus.NONE, rows=RowFormat.FULL
    )
    seeds = [replace(policy, seed=seed) for seed in range(40)]
    answers = [Answer(policy=p, prompt=(p.seed % VOCAB,)) for p in seeds]
    blocks = PAIR.blocks(answers, counts=[1] * len(seeds))
    for answer, block in zip(answers, blocks, strict=True):
        rows_NV = PAIR.rows(answer.policy, answer.prompt, block.tokens)
        found = verify(rows_NV, [answer.task(block)])[0]
        pair = reference.ModelPair(
            prompt=answer.prompt,
            drafter=PAIR.drafter,
            expert=PAIR.expert,
            policy=answer.policy,
        )
        pi, _ = target_distribution(rule, pair.probs_after(()))
        wanted = pair.draw(pi, reference.Purpose.NEXT_TOKEN, position=0, start=0)
        assert found.tokens == (wanted,)
        assert found.accepted == int(block.tokens == (wanted,))


def test_origins_tell_whether_lossless_verification_would_accept_the_token() -> None:
    """If not, a token that the rule accepts is reported as kept."""
    q, p = [0.6, 0.4, 0, 0], [0.0, 1, 0, 0]
    block = Block(tokens=(0,), likelihoods=(0.6,), draft_stats=(draft_stats_of(q),))
    keeps = judged(DecodingParams(rule=Chow(alpha=1), bonus=Bonus.NONE), block, log_rows(p))
    assert (keeps.tokens, keeps.origins) == ((0,), (Origin.KEPT,))
    assert (keeps.judged, keeps.deferred) == (1, 0)
    shared = replace(block, tokens=(1,), likelihoods=(0.4,))
    agrees = judged(DecodingParams(rule=Chow(alpha=1), bonus=Bonus.NONE), shared, log_rows(p))
    assert agrees.origins == (Origin.DRAFTER,)
    defers = judged(DecodingParams(rule=Bild(alpha=0), bonus=Bonus.NONE), block, log_rows(p))
    assert (defers.tokens, defers.origins) == ((1,), (Origin.EXPERT,))
    assert (defers.judged, defers.deferred) == (1, 1)


def test_token_rules_count_tokens_that_are_not_acceptable_as_deferred() -> None:
    policy = DecodingParams(rule=TokenV3(alpha=0.5), bonus=Bonus.NONE)
    rows_NV = log_rows([0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4])
    found = judged(policy, Block(tokens=(1, 0, 2), likelihoods=(0.5, 0.5, 0.5)), rows_NV)
    assert (found.accepted, found.judged, found.deferred) == (1, 2, 1)
    assert found.tokens[0] == 1


def test_a_clients_prediction_is_verified_like_a_one_hot_draft() -> None:
    """No rule keeps tokens that come without draft statistics against the expert."""
    rows_NV = log_rows([0.1, 0.7, 0.2], [0.1, 0.2, 0.7], [0.7, 0.2, 0.1])
    prediction = Block(tokens=(1, 2))
    greedy = DecodingParams(sampling=SamplingParams(temperature=0))
    assert judged(greedy, prediction, rows_NV).tokens == (1, 2, 0)
    for rule in (Chow(alpha=1), Diff(alpha=1), Opt(alpha=5), TokenV1(alpha=0.9)):
        found = judged(replace(greedy, rule=rule), Block(tokens=(0, 2)), rows_NV)
        assert (found.accepted, found.tokens) == (0, (1,)), rule
    samples = 3000
    policies = [DecodingParams(bonus=Bonus.NONE, seed=seed) for seed in range(samples)]
    tasks = [VerifyTask(policy=p, position=0, block=Block(tokens=(1,))) for p in policies]
    counts = Counter(v.tokens[0] for v in verify(rows_NV[:1].expand(samples, -1), tasks))
    found = [counts[v] for v in range(3)]
    assert stats.chisquare(found, [samples * x for x in (0.1, 0.7, 0.2)]).pvalue > 1e-3


def test_padding_is_never_emitted() -> None:
    """Ids from the limit on are impossible, even the likeliest."""
    row_1V = torch.cat([PAIR.expert_VV[:1], torch.full((1, 4), 50.0)], dim=1)
    for coupling, temperature in itertools.product(Coupling, (0.0, 1.0)):
        for seed in range(20):
            policy = DecodingParams(
                coupling=coupling,
                seed=seed,
                sampling=SamplingParams(temperature=temperature),
                logprobs=3,
            )
            found = judged(policy, Block(), row_1V, vocab_limit=VOCAB)
            assert found.tokens[0] < VOCAB
            assert all(token < VOCAB for token, _ in found.logprobs[0].top)


def test_log_probabilities_are_those_of_p0() -> None:
    """One entry per committed token, at temperature 1 and without penalties, best first."""
    policy = DecodingParams(
        sampling=SamplingParams(temperature=0, presence_penalty=1.0),
        logprobs=2,
        rule=TokenV3(alpha=1),
    )
    block = full_block(4, 7)
    rows_NV = PAIR.rows(policy, [0], block.tokens)
    found = judged(policy, block, rows_NV)
    assert found.accepted == 2
    log_NV = rows_NV.log_softmax(1)
    for j, (token, entry) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(log_NV[j, token]), abs=1e-5)
        best = log_NV[j].topk(2)
        assert [t for t, _ in entry.top] == best.indices.tolist()
    assert judged(replace(policy, logprobs=None), block, rows_NV).logprobs == ()


def test_token_v3_keeps_an_equally_good_wording() -> None:
    """Lossless rejects the drafter's first word, token_v3 accepts the sentence."""
    words = ["Buzz", "Edwin", "Aldrin", "is", "an", "Buzz-in-quotes"]
    buzz, edwin, aldrin, is_, an, quoted = range(len(words))
    q = [[0.9, 0.02, 0.02, 0.02, 0.02, 0.02], [0.02] * 2 + [0.9] + [0.02] * 3]
    q += [[0.02] * 3 + [0.9] + [0.02] * 2]
    block = Block(
        tokens=(buzz, aldrin, is_),
        likelihoods=(1.0, 1.0, 1.0),
        draft_stats=tuple(draft_stats_of(row) for row in q),
    )
    rows_NV = log_rows(
        [0.44, 0.5, 0.02, 0.02, 0.01, 0.01],  # Edwin "Buzz" Aldrin, or plainly Buzz Aldrin
        [0.02, 0.02, 0.9, 0.02, 0.02, 0.02],
        [0.02, 0.02, 0.02, 0.9, 0.02, 0.02],
        [0.02, 0.02, 0.02, 0.02, 0.9, 0.02],
    )
    greedy = DecodingParams(sampling=SamplingParams(temperature=0))
    strict = judged(greedy, block, rows_NV)
    assert (strict.accepted, strict.tokens) == (0, (edwin,))
    kind = judged(replace(greedy, rule=TokenV3(alpha=0.2)), block, rows_NV)
    assert kind.tokens == (buzz, aldrin, is_, an)
    assert kind.origins[:3] == (Origin.KEPT, Origin.DRAFTER, Origin.DRAFTER)
    assert quoted not in kind.tokens


halves = st.integers(-12, 12).map(lambda x: x / 2)

rows = st.lists(st.lists(halves, min_size=5, max_size=5), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(drafter=rows, expert=rows, alpha=st.floats(0, 0.99))
def test_some_rules_are_equal_at_temperature_0(
    drafter: list[list[float]], expert: list[list[float]], alpha: float
) -> None:
    """lossless = lossy; opt = diff = token_v1; token_v3 keeps iff p0(x) >= (1 - alpha) max p0."""
    q0 = torch.tensor(drafter, dtype=torch.float64).softmax(1)
    tokens = tuple(q0.argmax(1).tolist())
    peaks = q0.amax(1).tolist()
    block = Block(
        tokens=tokens,
        likelihoods=(1.0,) * 3,
        unscaled=tuple(peaks),
        draft_stats=tuple(
            DraftStats(max_prob=peak, argmax=token, entropy=0.0)
            for peak, token in zip(peaks, tokens, strict=True)
        ),
    )
    rows_NV = torch.tensor(expert, dtype=torch.float64)
    greedy = DecodingParams(sampling=SamplingParams(temperature=0), bonus=Bonus.NONE)

    def written(rule: Rule) -> tuple[int, ...]:
        return judged(replace(greedy, rule=rule), block, rows_NV).tokens

    assert written(Lossless()) == written(Lossy(alpha=alpha))
    assert written(Lossless()) == written(Lossy(alpha=alpha, beta="solved"))
    assert written(Opt(alpha=alpha)) == written(Diff(alpha=alpha)) == written(TokenV1(alpha=alpha))
    p0 = rows_NV.softmax(1)
    kept = [
        float(p0[j, token]) >= (1 - alpha) * float(p0[j].max()) for j, token in enumerate(tokens)
    ]
    first = kept.index(False) if False in kept else 3
    wanted = (*tokens[:first], *([int(p0[first].argmax())] if first < 3 else []))
    assert written(TokenV3(alpha=alpha)) == wanted


def test_an_ensemble_samples_at_temperature_0() -> None:
    """w p + (1 - w) q of two different one-hots is a mixture of two tokens."""
    samples = 2000
    block = Block(tokens=(0,), likelihoods=(1.0,))
    policy = DecodingParams(
        rule=Ensemble(weight=0.25), sampling=SamplingParams(temperature=0), bonus=Bonus.NONE
    )
    tasks = [
        VerifyTask(policy=replace(policy, seed=seed), position=0, block=block)
        for seed in range(samples)
    ]
    verdicts = verify(log_rows([0.1, 0.9]).expand(samples, -1), tasks)
    switched = sum(verdict.tokens == (1,) for verdict in verdicts)
    assert stats.binomtest(switched, samples, 0.25).pvalue > 1e-3


EXTREMES = st.sampled_from([-math.inf, -1e30, -200.0, -69.0, -1.0, 0.0, 1.0, 80.0, 1e30])

hard_rows = st.lists(
    st.lists(EXTREMES, min_size=5, max_size=5).filter(lambda row: max(row) > -math.inf),
    min_size=4,
    max_size=4,
)


ONE_TOKEN = [[-math.inf] * 4 + [-1e30]] * 4
BANNED_AFTER_TWO = [i for i in range(len(GRID)) if (4, 4, 4) in policy_at(i).constraints.bad_words]


def test_where_the_only_possible_token_is_banned_any_allowed_one_follows() -> None:
    for index in BANNED_AFTER_TWO[::7]:
        check_possible(drafter=ONE_TOKEN, expert=ONE_TOKEN, index=index, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    drafter=hard_rows,
    expert=hard_rows,
    index=st.integers(0, len(GRID) - 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_impossible_token_is_emitted(
    drafter: list[list[float]], expert: list[list[float]], index: int, seed: int
) -> None:
    """With probabilities of 0 and 1e-30 and one-hots, each token is possible for its origin."""
    check_possible(drafter=drafter, expert=expert, index=index, seed=seed)


def check_possible(
    *, drafter: list[list[float]], expert: list[list[float]], index: int, seed: int
) -> None:
    """Check that each token of an answer has positive probability for its origin."""
    policy = replace(policy_at(index), seed=seed, stop_ids=())
    pair = Bigrams(
        drafter_VV=torch.tensor([*drafter, drafter[0]]),
        expert_VV=torch.tensor([*expert, expert[0]]),
    )
    [text] = pair.decode([policy], [(0,)], draft_tokens=[3], max_tokens=5)
    assert len(text) == 5
    answer = list[int]()
    for token, origin in text:
        bits = allowed_bits(constraint_masks(policy, 5), answer, stop_ids=(), vocabulary=5)
        rows = [
            logits_VV[answer[-1] if answer else 0]
            for logits_VV in (pair.drafter_VV, pair.expert_VV)
        ]
        by_drafter, by_expert = (token in possible_tokens(row, bits) for row in rows)
        assert by_drafter if origin is not Origin.EXPERT else by_drafter or by_expert
        answer.append(token)


def possible_tokens(logits_V: torch.Tensor, allowed: Bits | None) -> set[int]:
    """Return the tokens of positive probability: any allowed one, if that leaves none."""
    tokens = [i for i in range(len(logits_V)) if allowed is None or allows(allowed, [i])[0]]
    return {i for i in tokens if logits_V[i] > -math.inf} or set(tokens)


def test_a_token_with_probability_0_in_its_own_draft_is_rejected() -> None:
    """It cannot have been sampled from the probabilities that were sent with it."""
    row = [0.5, 0.5, 0.0]
    pair = Bigrams(drafter_VV=log_rows(row, row, row), expert_VV=log_rows(row, row, row))
    policy = DecodingParams(bonus=Bonus.NONE)
    [block] = pair.blocks([Answer(policy=policy, prompt=(0,))], counts=[1])
    inconsistent = replace(block, tokens=(2,))
    assert judged(policy, inconsistent, log_rows([0.2, 0.3, 0.5])).accepted == 0
