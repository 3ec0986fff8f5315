"""The law of every rule as the server carries it out, against rules computed from plain logits.

A drafter's real messages cross the wire as bytes with `rows: auto`, at temperatures at which a
distribution has a heavy tail. The rules are written here once more, in numpy, from their formulas.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.support import enumeration
from tests.support.bigram_models import Bigrams, round_probs
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cascade.demo import DRAFTER, EXPERT
from cascade.drafter.text_draft import text_draft_of
from cascade.engine.settings import VocabularyWay
from cascade.engine.tokenizer import Tokenizer
from cascade.engine.vocabulary import VocabularyMap, map_vocabularies
from cascade.protocol.convert import decode_block, encode_block
from cascade.rules import Bild, Chow, ChowLog, Diff, Lossless, Lossy, Rule, TokenV3
from cascade.sampling.probs import process
from cascade.sampling.sparse_probs import sparsify
from cascade.speculation import acceptance
from cascade.speculation.draft import (
    DraftTask,
    block_of,
    draft_step,
    drafter_defers,
    with_lost_mass,
)
from cascade.speculation.modes import plan_for
from cascade.speculation.payload import (
    draft_cut,
    is_blockwise,
    needs_probs_after_block,
    payload_spec,
    sends_ids_only,
)
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.speculation.verify_batch import build_batch
from cascade.types import Block, Bonus, Coupling, DecodingParams, Mode, SamplingParams, Verification
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.speculation.draft import DraftToken
    from cascade.speculation.verify_batch import VerifyBatch

    Row = np.ndarray[Any, np.dtype[np.float64]]

BOUND = 1e-3  # in total variation: 1e-4 is cut, float16 rounds less than 5e-4

TEMPERATURES = (0.7, 1.2, 1.5)

RULES: tuple[Rule, ...] = (
    *enumeration.RULES,
    Lossy(alpha=0.3137, beta="solved"),
    Diff(alpha=1),  # keeps everything, as the drafter alone does
)

CHUNK = 400  # tasks that are judged at a time


def softmax(logits: Row, temperature: float = 1.0) -> Row:
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def entropy(row: Row) -> float:
    return float(-(row[row > 0] * np.log(row[row > 0])).sum())


def distance(a: Row, b: Row) -> float:
    """Return the total variation."""
    return float(np.maximum(a - b, 0).sum())


@dataclass(frozen=True)
class Position:
    """Plain logits of both models at one position."""

    drafter: Row
    expert: Row
    temperature: float
    lost: float = 0.0  # what the drafter gave to tokens that the expert has not

    @property
    def q(self) -> Row:
        return softmax(self.drafter, self.temperature)

    @property
    def p(self) -> Row:
        return softmax(self.expert, self.temperature)

    def defers(self, rule: Any) -> bool:
        """Return the decision of a rule on the whole position."""
        q, p, q0, p0 = self.q, self.p, softmax(self.drafter), softmax(self.expert)
        middle = (q + p) / 2
        uncut = np.append(q0 * (1 - self.lost), self.lost)
        surest, spread = uncut[:-1].max(), entropy(uncut)
        decisions: dict[str, Callable[[], bool]] = {
            "chow": lambda: surest < 1 - rule.alpha,
            "diff": lambda: surest < p0.max() - rule.alpha,
            "opt": lambda: surest < p0.max() - rule.alpha * distance(p, q),
            "chow_log": lambda: spread > rule.alpha,
            "diff_log": lambda: spread > entropy(p0) + rule.alpha,
            "opt_log": lambda: spread > entropy(p0) + rule.alpha * distance(p, q),
            "bild": lambda: -np.log(p0[q0.argmax()]) > rule.alpha,
            "fuzzy": lambda: entropy(middle) - (entropy(q) + entropy(p)) / 2 > rule.alpha,
        }
        return bool(decisions[rule.kind]())

    def law(self, rule: Any) -> Row:
        """Return pi = T(q, p)."""
        q, p, q0, p0 = self.q, self.p, softmax(self.drafter), softmax(self.expert)
        match rule.kind:
            case "lossless":
                return p
            case "ensemble":
                return rule.weight * p + (1 - rule.weight) * q
            case "lossy":
                lenient, over = np.minimum(q, p / (1 - rule.alpha)), np.maximum(p - q, 0)
                if rule.beta == "one":
                    return lenient + (1 - lenient.sum()) * over / over.sum()
                low, high = 0.0, 1 / (1 - rule.alpha)
                for _ in range(200):
                    share = (low + high) / 2
                    short = np.maximum(lenient, share * p).sum() < 1
                    low, high = (share, high) if short else (low, share)
                return np.maximum(lenient, high * p)
            case "token_v1" | "token_v2" | "token_v3" | "typical":
                unacceptable = {
                    "token_v1": lambda: q0 < p0.max() - rule.alpha,
                    "token_v2": lambda: p0 < p0.max() - rule.alpha,
                    "token_v3": lambda: p0 < (1 - rule.alpha) * p0.max(),
                    "typical": lambda: p0 < min(rule.epsilon, rule.delta * np.exp(-entropy(p0))),
                }[rule.kind]()
                return q * ~unacceptable + p * q[unacceptable].sum()
            case _:
                return p if self.defers(rule) else q


def policy_of(rule: Rule, temperature: float, **changes: Any) -> DecodingParams:
    """Return a policy under which a cut to the likeliest tokens would show."""
    sampling = SamplingParams(temperature=temperature)
    policy = DecodingParams(rule=rule, sampling=sampling, bonus=Bonus.NONE, row_entries=4)
    return replace(policy, **changes)


def drafted_from(logits: Row, policy: DecodingParams) -> Row:
    """Return the distribution that the drafter samples from."""
    logits_1V = torch.from_numpy(logits)[None].float()
    q = process(logits_1V, [policy.sampling], [])
    rows = sparsify(q.dense(), draft_cut(policy))
    weights = rows.weights_NK[0].double().numpy()
    found = np.zeros_like(logits)
    found[slice(None) if rows.ids_NK is None else rows.ids_NK[0].numpy()] = weights
    return found / found.sum()


def drafted(logits: Row, policy: DecodingParams, lost: float = 0.0) -> DraftToken:
    """Return a real draft, which carries what the expert reads of its distribution."""
    task = DraftTask(policy=policy, position=0, block_start=0)
    draft = draft_step(torch.from_numpy(logits)[None].float(), [task])[0]
    return with_lost_mass(draft, lost)


def sent(drafts: Sequence[DraftToken], length: int) -> Block:
    """Return a block as the expert has it after it crossed the wire."""
    proto = tokens_pb2.Block()
    encode_block(block_of(drafts, length=length), proto)
    return decode_block(tokens_pb2.Block.FromString(proto.SerializeToString()))


def as_drafted(draft: DraftToken, token: int, q: Row, logits: Row) -> DraftToken:
    """Return the same draft with another token."""
    unscaled = None if draft.unscaled is None else float(softmax(logits)[token])
    return replace(draft, token=token, likelihood=float(q[token]), unscaled=unscaled)


def tasks_of_one_token(at: Position, policy: DecodingParams) -> tuple[list[VerifyTask], Row]:
    """Return a task for each token that can be drafted, and how likely each is."""
    q, draft = drafted_from(at.drafter, policy), drafted(at.drafter, policy, at.lost)
    tokens = np.flatnonzero(q)
    blocks = [sent([as_drafted(draft, int(token), q, at.drafter)], 1) for token in tokens]
    return [VerifyTask(policy=policy, position=0, block=block) for block in blocks], q[tokens]


def law_of_one_token(at: Position, policy: DecodingParams) -> Row:
    """Return the distribution of the token that is committed for a block of one token."""
    return law_of_blocks(at, policy, *tasks_of_one_token(at, policy))


def law_of_blocks(
    at: Position, policy: DecodingParams, tasks: Sequence[VerifyTask], chances: Row
) -> Row:
    """Return the distribution of the first token that is committed for one of some blocks."""
    found = np.zeros_like(at.drafter)
    for first in range(0, len(tasks), CHUNK):
        some = tasks[first : first + CHUNK]
        batch = build_batch(torch.from_numpy(at.expert).float().expand(len(some), -1), some)
        accept = acceptance.accept_probabilities(batch).numpy()
        if is_blockwise(policy):
            accept = np.array([h for (h,) in acceptance.prefix_acceptance(batch).probabilities])
        chance = chances[first : first + CHUNK]
        np.add.at(found, [task.block.tokens[0] for task in some], chance * accept)
        wanted = [acceptance.next_token(batch, i, 0) for i in range(len(some))]
        rows = acceptance.next_token_weights(batch, [one for one in wanted if one]).weights_NK
        rejected = rows.double() / rows.double().sum(dim=1, keepdim=True)
        found += (chance * (1 - accept)) @ rejected.numpy()
    return found


def dense_pi(batch: VerifyBatch) -> Row:
    """Return the target distribution of the first judged position over the vocabulary."""
    target = batch.target_at([0])
    pi_K = target.pi_EK[0].double().numpy()
    if target.ids_EK is None:
        return pi_K
    found = batch.p.dense()[0].double().numpy() * float(target.tail_E[0])
    valid = slice(None) if target.valid_EK is None else target.valid_EK[0].numpy()
    found[target.ids_EK[0].numpy()[valid]] = pi_K[valid]
    return found


def assert_shared_noise_follows(at: Position, rule: Rule) -> None:
    """Under shared noise what is committed is argmax(log pi + g), or a draft that is kept."""
    policy = policy_of(rule, at.temperature, coupling=Coupling.GUMBEL)
    block = sent([drafted(at.drafter, policy, at.lost)], 1)
    task = VerifyTask(policy=policy, position=0, block=block)
    batch = build_batch(torch.from_numpy(at.expert).float()[None], [task])
    if payload_spec(policy).probs or rule.kind == "lossless":
        assert distance(dense_pi(batch), at.law(rule)) < BOUND
        return
    assert isinstance(rule, Chow | ChowLog | Diff | Bild) or rule.kind == "diff_log"
    assert distance(drafted_from(at.drafter, policy), at.q) < BOUND
    deferred = batch.deferred
    assert deferred is not None
    assert bool(deferred[0]) == at.defers(rule)


def assert_modes_follow(at: Position) -> None:
    """Without a verifier the drafter's own distribution is followed, or the expert's."""
    for mode in (Mode.DRAFTER_ONLY, Mode.SEQUENCE_CASCADE):
        policy = plan_for(mode, policy_of(enumeration.RULES[0], at.temperature)).params
        assert distance(drafted_from(at.drafter, policy), at.q) < BOUND
    for rule in (Chow(alpha=0.4519), ChowLog(alpha=0.8917)):
        for mode in (Mode.TOKEN_CASCADE, Mode.CASCADE, Mode.SPECULATIVE):
            policy = plan_for(mode, policy_of(rule, at.temperature)).params
            draft = drafted(at.drafter, policy, at.lost)
            assert drafter_defers(policy, draft) == at.defers(rule)
            assert distance(drafted_from(at.drafter, policy), at.q) < BOUND


PAIR = Bigrams.random(vocab=120, seed=3)


def toy(text: Sequence[int], temperature: float, pair: Bigrams = PAIR) -> Position:
    drafter, expert = pair.drafter(text).double().numpy(), pair.expert(text).double().numpy()
    return Position(drafter, expert, temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_follows_its_rule_whatever_crosses_the_wire(rule: Rule, temperature: float) -> None:
    """In token verification and in block verification, and under shared noise."""
    at = toy([5], temperature)
    for verification in Verification:
        policy = policy_of(rule, temperature, verification=verification)
        assert distance(law_of_one_token(at, policy), at.law(rule)) < BOUND
    assert_shared_noise_follows(at, rule)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_modes_without_a_verifier_follow_the_models_themselves(temperature: float) -> None:
    assert_modes_follow(toy([5], temperature))


def different_vocabularies(*, seed: int) -> VocabularyMap:
    """Return a map of 90 tokens to 120, of which 70 are the same under other ids."""
    order = np.random.default_rng(seed).permutation(140)
    tables = [letters(codes) for codes in (order[:90], order[:19:-1])]
    sizes = {"drafter_size": 90, "expert_size": 120}
    return map_vocabularies(*tables, **sizes, way=VocabularyWay.TLI)


def letters(codes: np.ndarray[Any, np.dtype[np.int64]]) -> Tokenizer:
    """Return a tokenizer with one letter for each code."""
    vocabulary = {chr(0x4E00 + int(code)): id_ for id_, code in enumerate(codes)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def restricted(text: Sequence[int], temperature: float, vocabulary: VocabularyMap) -> Position:
    """Return a position of a drafter that has other tokens than the expert."""
    own = Bigrams.random(vocab=90, seed=7).drafter([text[-1] % 90])
    logits, lost = vocabulary.restrict(own[None])
    theirs = 0.9 * logits[0] + PAIR.expert(text) - PAIR.drafter(text)
    shared = torch.zeros(120, dtype=torch.bool)
    shared[list(vocabulary.pairs)] = True
    expert = torch.where(shared, theirs, PAIR.expert(text))
    rows = (logits[0].double().numpy(), expert.double().numpy())
    return Position(*rows, temperature, lost=lost.item())


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_follows_its_rule_where_vocabularies_differ(rule: Rule, temperature: float) -> None:
    """q is what is left of the drafter's distribution; confidence is read before that."""
    vocabulary = different_vocabularies(seed=1)
    assert len(vocabulary.pairs) == 70
    at = restricted([5], temperature, vocabulary)
    assert 0.1 < at.lost < 0.9
    assert set(np.flatnonzero(at.q)) == set(vocabulary.pairs)
    for verification in Verification:
        policy = policy_of(rule, temperature, verification=verification)
        assert distance(law_of_one_token(at, policy), at.law(rule)) < BOUND
    assert_shared_noise_follows(at, rule)


@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rule", [Lossless(), TokenV3(alpha=0.7)], ids=lambda rule: rule.kind)
def test_a_draft_of_text_follows_its_rule_whatever_it_is(
    rule: Rule, temperature: float, verification: Verification
) -> None:
    """It is drafted for certain: under token_v3 it is kept if it is acceptable, else p follows."""
    at = toy([5], temperature)
    p0 = softmax(at.expert)
    policy = policy_of(rule, temperature, verification=verification)
    for token in (int(p0.argmax()), int(p0.argmin()), 7, 31, 90):
        block = sent([text_draft_of(policy, token)], 1)
        task = VerifyTask(policy=policy, position=0, block=block)
        keeps = rule.kind == "token_v3" and p0[token] >= (1 - 0.7) * p0.max()
        expected = np.eye(120)[token] if keeps else at.p
        assert distance(law_of_blocks(at, policy, [task], np.ones(1)), expected) < 1e-6


def test_a_draft_of_text_does_not_change_what_shared_noise_chooses() -> None:
    at = toy([5], 1.2)
    policy = policy_of(Lossless(), 1.2, coupling=Coupling.GUMBEL)
    logits = torch.from_numpy(at.expert).float()[None]
    alone = verify(logits, [VerifyTask(policy=policy, position=0)])[0].tokens
    for token in range(120):
        block = sent([text_draft_of(policy, token)], 1)
        verdict = verify(logits, [VerifyTask(policy=policy, position=0, block=block)])[0]
        assert verdict.tokens == alone
        assert verdict.accepted == (alone == (token,))


def test_modes_without_a_verifier_follow_a_restricted_drafter() -> None:
    for text in range(8):
        assert_modes_follow(restricted([text], 1.2, different_vocabularies(seed=1)))


def test_lost_mass_is_what_the_expert_has_no_tokens_for() -> None:
    vocabulary = different_vocabularies(seed=2)
    logits = Bigrams.random(vocab=90, seed=7).drafter_VV
    q = logits.double().softmax(dim=1)
    found, lost = vocabulary.restrict(logits)
    expert, drafter = (list(ids) for ids in (vocabulary.pairs, vocabulary.pairs.values()))
    assert torch.equal(found[:, expert], logits[:, drafter])
    assert torch.allclose(lost.double(), 1 - q[:, drafter].sum(dim=1), atol=1e-6)


SMALL = Bigrams.random(vocab=20, seed=4)


def law_of_two_tokens(policy: DecodingParams, temperature: float) -> dict[tuple[int, ...], float]:
    """Return the distribution of what a round over a block of two tokens commits."""
    tasks, logits, chances = list[VerifyTask](), list[torch.Tensor](), list[float]()
    for tokens in itertools.product(range(20), repeat=2):
        texts = [[5], [5, tokens[0]], [5, *tokens]]
        at = [toy(text, temperature, SMALL) for text in texts]
        qs = [_drafted_from(text[-1], policy) for text in texts]
        drafts = [
            as_drafted(_drafted(text[-1], policy), token, q, one.drafter)
            for text, token, q, one in zip(texts, (*tokens, 0), qs, at, strict=True)
        ][: 2 + needs_probs_after_block(policy)]
        chance = float(qs[0][tokens[0]] * qs[1][tokens[1]])
        if chance > 0:
            tasks.append(VerifyTask(policy=policy, position=0, block=sent(drafts, 2)))
            rows = [torch.from_numpy(one.expert) for one in at]
            logits += rows[: rows_needed(policy, tokens)]
            chances.append(chance)
    return round_probs(build_batch(torch.stack(logits).float(), tasks), chances)


@cache
def _drafted_from(last: int, policy: DecodingParams) -> Row:
    return drafted_from(SMALL.drafter([last]).double().numpy(), policy)


@cache
def _drafted(last: int, policy: DecodingParams) -> DraftToken:
    return drafted(SMALL.drafter([last]).double().numpy(), policy)


def assert_two_tokens_follow(rule: Rule, temperature: float, **changes: Any) -> None:
    """Two tokens follow the product of pi, whether or not the second is of the same round."""
    policy = policy_of(rule, temperature, **changes)
    first, seconds = np.zeros(20), np.zeros((20, 20))
    for text, mass in law_of_two_tokens(policy, temperature).items():
        first[text[0]] += mass
        if len(text) > 1:
            seconds[text[0], text[1]] += mass
    at = toy([5], temperature, SMALL)
    assert distance(first, at.law(rule)) < BOUND
    # A round of one token is continued by the next round, whose first token follows pi.
    alone = first - seconds.sum(axis=1)
    laws = np.array([toy([5, i], temperature, SMALL).law(rule) for i in range(20)])
    found = seconds + alone[:, None] * laws
    assert distance(found.ravel(), (at.law(rule)[:, None] * laws).ravel()) < 2 * BOUND


VARIANTS = [
    {"verification": verification, "bonus": bonus}
    for verification in Verification
    for bonus in (Bonus.NONE, Bonus.TARGET)
]


@pytest.mark.parametrize("rule", [RULES[1], RULES[5], RULES[12]], ids=lambda rule: rule.kind)
def test_two_tokens_follow_the_product_of_their_rule(rule: Rule) -> None:
    assert_two_tokens_follow(rule, 1.5, **VARIANTS[0])
    assert_two_tokens_follow(rule, 1.5, **VARIANTS[3])


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_two_tokens_follow_the_product_of_every_rule(
    rule: Rule, temperature: float, changes: dict[str, Any]
) -> None:
    assert_two_tokens_follow(rule, temperature, **changes)


@cache
def shipped_logits() -> list[tuple[Row, Row]]:
    """Return plain logits of the pair that ships, after a question and after answers begun."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow tests only

    tokenizer: Any = AutoTokenizer.from_pretrained(EXPERT)
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (DRAFTER, EXPERT)
    ]
    question = [{"role": "user", "content": "Who is Buzz Aldrin?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    texts: list[list[int]] = [prompt]
    with torch.inference_mode():
        for model in models:  # the second token, after what each model says first
            best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
            texts.append([*prompt, best])
        found = [[model(torch.tensor([text])).logits[0, -1] for model in models] for text in texts]
    return [(q.double().numpy(), p.double().numpy()) for q, p in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_pair_that_ships_follows_every_rule(rule: Rule, temperature: float) -> None:
    """Over its whole vocabulary, for the first token of an answer and for the second."""
    for drafter, expert in shipped_logits():
        at = Position(drafter, expert, temperature)
        policy = policy_of(rule, temperature, row_entries=64)
        assert distance(law_of_one_token(at, policy), at.law(rule)) < BOUND
        if not sends_ids_only(policy):
            assert_shared_noise_follows(at, rule)
        assert_modes_follow(at)
