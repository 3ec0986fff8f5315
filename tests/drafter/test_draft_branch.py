"""A branch drafts the requested block, guesses past it, and stays valid while it is continued."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support.draft_branches import digest, drafted, new_branch, propose
from tests.support.fake_engine import GREEDY

from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.protocol.services import DRAFT_LIMIT
from cascade.rules import Chow, Ensemble, Opt
from cascade.sampling.rng import Purpose
from cascade.speculation.confidence import Calibration
from cascade.speculation.draft import forced_draft
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import Bonus, DraftStats, Grammar, GrammarKind, RowFormat, SessionId

if TYPE_CHECKING:
    from cascade.drafter.draft_branch import DraftBranch
    from cascade.protocol.messages import Proposal, Propose
    from cascade.types import DecodingParams


def complete(branch: DraftBranch, *tokens: int, prob: float | None = None) -> Proposal:
    """Draft tokens, the last of which completes a block; return its proposal."""
    for token in tokens[:-1]:
        proposal, request = branch.add(drafted(token, prob))
        assert proposal is None
        assert request is not None
    proposal, _ = branch.add(drafted(tokens[-1], prob))
    assert proposal is not None
    return proposal


def test_each_drafted_token_is_the_next_input_until_the_block_is_complete() -> None:
    branch = new_branch(5)
    proposal, request = branch.add(drafted(6))
    assert proposal is None
    assert request is not None
    assert (request.session, request.base, request.tokens) == ("s/0", 3, (6,))
    proposal, request = branch.add(drafted(7))
    assert proposal is not None
    assert (proposal.position, proposal.digest) == (1, digest(5))
    assert (proposal.block.tokens, proposal.passes) == ((6, 7), 2)
    assert branch.is_requested(proposal)
    assert request is None
    assert branch.paused


def test_a_block_ahead_starts_after_the_guess_of_the_experts_token() -> None:
    branch = new_branch(message=propose(ahead=1))
    branch.add(drafted(3))
    _, request = branch.add(drafted(4))
    assert request is not None
    assert (request.base, request.tokens) == (3, (4,))
    assert branch.task(spare_capacity=False).purpose is Purpose.NEXT_TOKEN
    proposal, request = branch.add(drafted(5))
    assert proposal is None
    assert request is not None
    assert branch.task(spare_capacity=False).purpose is Purpose.DRAFT
    assert branch.block.prefix == (3, digest(3, 4, 5))
    ahead = complete(branch, 6, 7)
    assert (ahead.position, ahead.block.tokens) == (3, (6, 7))
    assert not branch.is_requested(ahead)
    assert branch.paused


def test_without_a_bonus_the_block_ahead_starts_at_once() -> None:
    policy = replace(GREEDY, bonus=Bonus.NONE)
    branch = new_branch(message=propose(ahead=1), policy=policy)
    complete(branch, 3, 4)
    assert branch.block.prefix == (2, digest(3, 4))


def test_the_drafted_probabilities_after_a_block_serve_as_the_guess() -> None:
    """With a bonus from the target distribution, one token more is drafted with the block."""
    policy = replace(GREEDY, bonus=Bonus.TARGET, rule=Opt(alpha=0.2))
    branch = new_branch(message=propose(ahead=1, floor=0.5), policy=policy)
    assert not branch.may_stop_early
    assert complete(branch, 3, 4, 5).block.tokens == (3, 4)
    assert branch.block.prefix == (3, digest(3, 4, 5))


def test_follow_accepts_a_request_for_a_block_ahead() -> None:
    calibration = Calibration()
    branch = new_branch(message=propose(ahead=1), calibration=calibration)
    complete(branch, 3, 4, prob=0.55)
    branch.add(drafted(5))
    message = propose(3, 4, 5, ahead=2)
    assert branch.follow(message)
    assert branch.message is message
    assert branch.requested is branch.block
    assert calibration.acceptance_prob(0.55) > 0.55, "both drafts were accepted"


def test_follow_refuses_other_prefixes() -> None:
    branch = new_branch(message=propose(ahead=1))
    complete(branch, 3, 4)
    branch.add(drafted(5))
    assert not branch.follow(propose(3, 4, 6))
    assert not branch.follow(propose(3))
    assert not branch.follow(propose()), "the same block again needs a new branch"


def test_a_request_for_more_blocks_resumes_a_paused_branch() -> None:
    branch = new_branch(message=propose(ahead=1))
    complete(branch, 3, 4)
    branch.add(drafted(5))
    complete(branch, 6, 7)
    assert branch.paused
    assert branch.resume() is None
    assert branch.follow(propose(3, 4, 5, ahead=1))
    request = branch.resume()
    assert request is not None
    assert (request.tokens, branch.guessing, branch.paused) == ((7,), True, False)


def test_a_deferred_token_ends_the_block_and_serves_as_the_guess() -> None:
    policy = replace(GREEDY, rule=Chow(alpha=0.5), bonus=Bonus.NONE)
    branch = new_branch(message=propose(count=8, ahead=1, until_deferral=True), policy=policy)
    sure = replace(drafted(3), draft_stats=DraftStats(max_prob=0.9, argmax=3, entropy=0.0))
    unsure = replace(drafted(4), draft_stats=DraftStats(max_prob=0.1, argmax=4, entropy=0.0))
    branch.add(sure)
    proposal, _ = branch.add(unsure)
    assert proposal is not None
    assert (proposal.block.tokens, proposal.deferred) == ((3,), True)
    assert branch.requested.guess is unsure
    assert branch.block.prefix == (2, digest(3, 4))


@pytest.mark.parametrize("tokens", [(0,), (3, 0)])
def test_a_stop_token_ends_the_branch(tokens: tuple[int, ...]) -> None:
    policy = replace(GREEDY, stop_ids=(0,))
    branch = new_branch(message=propose(count=3, ahead=1), policy=policy)
    assert complete(branch, *tokens).block.tokens == tokens
    assert branch.ended
    assert branch.resume() is None


def test_a_stop_token_as_the_guess_ends_the_branch() -> None:
    branch = new_branch(message=propose(ahead=1), policy=replace(GREEDY, stop_ids=(0,)))
    complete(branch, 3, 4)
    assert branch.add(drafted(0)) == (None, None)
    assert branch.ended
    assert branch.paused


@pytest.mark.parametrize(("limit", "drafts_ahead"), [(7, False), (8, True)])
def test_no_block_ahead_begins_that_does_not_fit_the_context(
    limit: int, *, drafts_ahead: bool
) -> None:
    """It takes the last draft, the guess and as many tokens as were requested."""
    branch = new_branch(message=propose(ahead=1), limit=limit)
    branch.add(drafted(3))
    _, request = branch.add(drafted(4))
    assert (request is not None) == drafts_ahead


def test_a_block_ends_where_its_acceptance_is_less_likely_than_the_floor() -> None:
    branch = new_branch(message=propose(count=4, ahead=1, floor=0.5))
    assert branch.may_stop_early
    assert branch.task(spare_capacity=False).with_confidence
    branch.add(drafted(3, 0.8))
    proposal, request = branch.add(drafted(4, 0.5))
    assert proposal is not None
    assert proposal.block.tokens == (3, 4)
    assert request is None, "nothing is drafted ahead of it"


def test_candidates_are_rejections_by_their_probability() -> None:
    branch = new_branch(message=propose(branches=4))
    assert not branch.can_fork
    branch.add(drafted(3, 0.75, runner_up=8))
    branch.add(drafted(4, 0.5, runner_up=9))
    assert branch.can_fork
    found = [(one.accepted, one.token, one.prob) for one in branch.candidates()]
    assert found == [(0, 8, 0.25 * 0.5), (1, 9, pytest.approx(0.75 * 0.5 * 0.5))]


def test_another_bonus_token_than_the_guess_is_a_candidate() -> None:
    branch = new_branch(message=propose(ahead=1, branches=4))
    branch.add(drafted(3, 1.0))
    branch.add(drafted(4, 1.0))
    assert not branch.can_fork, "the guess is not known yet"
    branch.add(drafted(5, 0.5, runner_up=9))
    assert branch.can_fork
    likely = [one for one in branch.candidates() if one.prob > 0]
    assert [(one.accepted, one.token, one.prob) for one in likely] == [(2, 9, 0.25)]


def test_no_candidate_ends_the_answer_or_exceeds_the_context() -> None:
    policy = replace(GREEDY, stop_ids=(0,))
    branch = new_branch(message=propose(branches=4), policy=policy, limit=7)
    branch.add(drafted(3, 0.5, runner_up=0))
    branch.add(drafted(4, 0.5, runner_up=9))
    assert list(branch.candidates()) == []
    branch.limit = 8
    assert [one.accepted for one in branch.candidates()] == [1]


def test_a_block_drafted_until_a_deferral_is_in_doubt_only_at_its_guess() -> None:
    policy = replace(GREEDY, rule=Chow(alpha=0.5), bonus=Bonus.NONE)
    message = propose(count=4, until_deferral=True, branches=4)
    branch = new_branch(message=message, policy=policy)
    for token, max_prob in ((3, 0.9), (4, 0.1)):
        stats = DraftStats(max_prob=max_prob, argmax=token, entropy=0.0)
        branch.add(replace(drafted(token, 0.5, runner_up=9), draft_stats=stats))
    found = [(one.accepted, one.prob) for one in branch.candidates()]
    assert found == [(0, 0.0), (1, 0.25)]


def test_a_fork_drafts_the_block_after_another_verdict() -> None:
    branch = new_branch(5, message=propose(5, ahead=2, branches=1))
    branch.add(drafted(6, 0.5, runner_up=8))
    branch.add(drafted(7, 0.5, runner_up=9))
    *_, candidate = branch.candidates()
    fork, request = branch.fork(candidate, engine_id=SessionId("s/1"))
    assert (request.session, request.parent, request.base) == ("s/1", "s/0", 4)
    assert request.tokens == (9,)
    assert fork.block.prefix == (3, digest(5, 6, 9))
    proposal = complete(fork, 10, 11)
    assert (proposal.branched, proposal.block.tokens) == (True, (10, 11))
    assert fork.paused, "it drafts one block only"
    assert branch.tokens[:3] == [5, 6, 7], "the tokens of the main branch are its own"


def test_a_fork_that_becomes_the_main_branch_drafts_ahead() -> None:
    calibration = Calibration()
    branch = new_branch(message=propose(branches=1), calibration=calibration)
    branch.add(drafted(3, 0.55, runner_up=8))
    branch.add(drafted(4, 0.55, runner_up=9))
    candidate = next(branch.candidates())
    fork, _ = branch.fork(candidate, engine_id=SessionId("s/1"))
    complete(fork, 10, 11)
    assert fork.follow(propose(8, ahead=1))
    assert calibration.acceptance_prob(0.55) < 0.55, "the first draft was rejected"
    fork.engine_id = None
    request = fork.resume()
    assert request is not None
    assert request.session == "s/0"


def test_committed_tokens_that_differ_teach_how_many_drafts_were_accepted() -> None:
    calibration = Calibration()
    branch = new_branch(calibration=calibration)
    branch.add(drafted(3, 0.95))
    branch.add(drafted(4, 0.15))
    branch.learn_mismatch([3, 9])
    assert calibration.acceptance_prob(0.95) > 0.95
    assert calibration.acceptance_prob(0.15) < 0.15


@pytest.mark.parametrize("tokens", [[], [3], [3, 4], [3, 4, 5]])
def test_committed_tokens_that_agree_teach_nothing(tokens: list[int]) -> None:
    calibration = Calibration()
    branch = new_branch(calibration=calibration)
    complete(branch, 3, 4, prob=0.5)
    branch.learn_mismatch(tokens)
    assert calibration == Calibration()


def test_a_block_that_no_expert_verified_teaches_nothing() -> None:
    policy = replace(GREEDY, rule=Chow(alpha=0.5), bonus=Bonus.NONE)
    calibration = Calibration()
    message = propose(until_deferral=True)
    branch = new_branch(message=message, policy=policy, calibration=calibration)
    stats = DraftStats(max_prob=0.9, argmax=3, entropy=0.0)
    branch.add(replace(drafted(3, 0.5), draft_stats=stats))
    branch.learn_mismatch([9])
    assert calibration == Calibration()


def test_confidence_is_computed_only_where_something_reads_it() -> None:
    plain, forking = new_branch(), new_branch(message=propose(branches=1))
    assert not plain.task(spare_capacity=True).with_confidence
    assert forking.task(spare_capacity=True).with_confidence
    assert not forking.task(spare_capacity=False).with_confidence


LETTERS = "_ABCDE"  # the first token ends the answer


def begun(
    pattern: str, message: Propose, *, policy: DecodingParams = GREEDY, limit: int = 200
) -> DraftBranch:
    """Return a branch whose answer must match a pattern, and that has begun its first block."""
    policy = replace(policy, stop_ids=(0,))
    branch = new_branch(message=message, policy=policy, limit=limit)
    texts = (b"", *(letter.encode() for letter in LETTERS[1:]))
    tokens = TokenTexts(texts=texts, special_ids=frozenset({0}), stop_ids=(0,))
    grammar = Grammar(kind=GrammarKind.REGEX, text=pattern)
    branch.session.masks = (GrammarCompiler(tokens).mask(grammar, (0,)),)
    branch.session.vocabulary = len(LETTERS)
    branch.begin(
        ForwardRequest(share=NOBODYS, session=SessionId("s/0"), base=1, tokens=(2,), num_logits=1)
    )
    return branch


def written(*tokens: int) -> str:
    return "".join(LETTERS[token] for token in tokens)


def test_forced_tokens_are_drafted_without_a_pass_and_do_not_count() -> None:
    branch = begun("AB[CD]E{7}[AC]BBBD?", propose(count=2, ahead=1))
    proposal, request = branch.add(drafted(3))
    assert proposal is None
    assert request is not None
    assert written(*request.tokens) == "CEEEEEEE"
    proposal, _ = branch.add(drafted(1))
    assert proposal is not None
    assert written(*proposal.block.tokens) == "ABCEEEEEEEABBB"
    free = [at for at, forced in enumerate(proposal.block.forced) if not forced]
    assert free == [2, 10]
    assert proposal.passes == 2
    assert branch.guessing, "D, or the end"


def test_a_forced_end_belongs_to_the_block() -> None:
    branch = begun("A[BC]DD", propose(count=4))
    proposal, request = branch.add(drafted(2))
    assert proposal is not None
    assert written(*proposal.block.tokens) == "ABDD_"
    assert request is None
    assert branch.ended


@pytest.mark.parametrize(("limit", "length"), [(200, DRAFT_LIMIT), (20, 16)])
def test_a_run_of_forced_tokens_goes_on_in_the_next_block_where_one_may_be_no_longer(
    limit: int, length: int
) -> None:
    """Not longer than verifiers take, nor than the context holds."""
    branch = begun("[AB]C{100}[DE]", propose(count=1, ahead=1), limit=limit)
    proposal, _ = branch.add(drafted(1))
    assert proposal is not None
    assert written(*proposal.block.tokens) == "A" + "C" * (length - 1)
    assert branch.paused == (limit == 20)
    if not branch.paused:
        ahead, _ = branch.add(drafted(4))
        assert ahead is not None
        assert written(*ahead.block.tokens) == "C" * (100 - length) + "D_"


def test_what_follows_a_block_is_described_after_its_forced_tokens() -> None:
    policy = replace(GREEDY, rule=Ensemble(weight=0.5), bonus=Bonus.TARGET, rows=RowFormat.FULL)
    branch = begun("A[BC]DD[AB]E", propose(count=1), policy=policy)
    probs = replace(forced_draft(policy, 2), forced=False)
    proposal, request = branch.add(probs)
    assert proposal is None
    assert request is not None
    assert written(*request.tokens) == "BDD"
    proposal, _ = branch.add(probs)
    assert proposal is not None
    assert written(*proposal.block.tokens) == "ABDD"
    assert len(proposal.block.draft_probs) == 5
