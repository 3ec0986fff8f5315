"""The drafter: drafts the next tokens of sessions, one forward pass per token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the input of the next pass without leaving the engine's thread. All that is drafted of a
session, on request or ahead, is its `DraftTree`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from cascade.drafter.draft_branch import DraftBranch, PendingBlock
from cascade.drafter.draft_tree import DraftSession, DraftTree
from cascade.drafter.text_draft import TextDraft
from cascade.engine.forward import invalid_rows
from cascade.engine.model_pair import map_to_expert
from cascade.engine.settings import VocabularyWay
from cascade.errors import InvalidRequest
from cascade.protocol.messages import Propose
from cascade.protocol.services import DRAFTER
from cascade.replica.replica import Replica, Result
from cascade.sampling.tensor_ops import to_list
from cascade.speculation.confidence import Calibration
from cascade.speculation.cost_model import StepTime
from cascade.speculation.draft import can_draw, draft_step, draw, with_lost_mass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.request import ForwardRequest, LogitsOutput
    from cascade.engine.tokenizer import Tokenizer
    from cascade.engine.vocabulary import VocabularyMap
    from cascade.protocol.messages import Proposal
    from cascade.replica.options import ReplicaOptions
    from cascade.replica.session import ReplicaSession
    from cascade.rules import Rule
    from cascade.speculation.draft import DraftTask, DraftToken

log = logging.getLogger(__name__)

MAX_BRANCH_OVERHEAD = 1.0  # share of its time by which branches may lengthen a pass
_MAX_ROWS = 128  # of logits that are read together: more would take memory that nothing is left of
MAX_RULES = 1024  # whose calibrations are kept: callers choose the parameters of rules


@dataclass(frozen=True, slots=True, kw_only=True)
class _DraftedToken:
    """A token drafted for a branch, and the one that follows if it has run as expected."""

    branch: DraftBranch
    draft: DraftToken
    task: DraftTask  # that it was drafted for
    fed: int | None  # the token that has run after the branch's others; None if none has
    next: _DraftedToken | None

    def has_run(self, runs: Mapping[int, ForwardRequest], *, spare: float) -> bool:
        """Return whether what the branch requests now has run, and `next` is what it yields.

        Args:
            runs: The requests that follow the token, by the id of their branch.
            spare: As for the token's own task.
        """
        request, branch = runs.get(id(self.branch)), self.branch
        return (
            request is not None
            and self.next is not None
            and list(request.tokens) == [self.fed]
            and branch.task(spare_capacity=spare > 0) == self.next.task
        )


class Drafter(Replica[Propose]):
    """A replica of the drafter tier; its engine's logits handler."""

    kind = DRAFTER
    session_class = DraftSession

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        options: ReplicaOptions,
        *,
        vocabulary: VocabularyMap | None = None,
        **more: Any,
    ) -> None:
        """Make a drafter, as `Replica` does.

        Args:
            model: The model.
            tokenizer: The model's.
            options: What is served.
            vocabulary: How its tokens are said in the expert's; None: they are the same.
            more: The other arguments of `Replica`.
        """
        if vocabulary is not None:
            tokenizer, more["vocab_size"] = vocabulary.expert.tokenizer, vocabulary.size
        super().__init__(model, tokenizer, options, **more)
        self._vocabulary = vocabulary
        by_text = vocabulary is not None and vocabulary.way is VocabularyWay.SLEM
        self._by_text = vocabulary if by_text else None
        self._calibrations: dict[Rule, Calibration] = {}
        self._step_time = StepTime()  # of passes of a token or two per session

    @classmethod
    def maker(
        cls, options: ReplicaOptions, tokenizer: Tokenizer, vocabulary: int
    ) -> Callable[..., Drafter]:
        """Return what makes a drafter that drafts in the expert's tokens.

        Args:
            options: What is served, and for which expert.
            tokenizer: The drafter's.
            vocabulary: Logits of the drafter.

        Raises:
            StartupError: The expert's tokenizer cannot be read, or has too little in common.
        """
        if options.expert is None:
            return cls
        found = map_to_expert(options.expert, tokenizer, vocabulary)
        return cls if found.identical else partial(cls, vocabulary=found)

    def new_session(self, **fields: Any) -> ReplicaSession:
        """Return a session that has been opened."""
        return super().new_session(vocabulary_map=self._vocabulary, **fields)

    def preparation(self, session: ReplicaSession) -> Callable[[], object] | None:
        """Return what another thread must do before a session begins; None: nothing."""
        assert isinstance(session, DraftSession), "a drafter opens sessions of this class"
        compiling = super().preparation(session)
        if self._vocabulary is None:
            return compiling

        def prepare() -> None:
            session.translate_prompt()
            self.check_context(session.engine_length(session.tokens), 0)
            if compiling is not None:
                compiling()

        return prepare

    def begin(self, session: ReplicaSession, message: Propose) -> Sequence[ForwardRequest]:
        """Return the forward requests that lead to a block, unless it was sent already.

        Where the context ends, the block does.

        Raises:
            InvalidRequest: Less than one token is requested.
            ContextTooLong: The context holds no token more.
        """
        assert isinstance(session, DraftSession), "a drafter opens sessions of this class"
        if message.count < 1:
            raise InvalidRequest(
                f"a proposal of {message.count} tokens was asked for; ask for at least 1"
            )
        held = session.engine_length(session.tokens)
        self.check_context(held, 1)
        if self._by_text is not None:
            limit = self.describe().context_length
            text = TextDraft(
                session=session, message=message, vocabulary=self._by_text, limit=limit
            )
            return [text.begin()]
        room = self.describe().context_length - held
        message = replace(message, count=min(message.count, room))
        spare, tree = self.engine.spare, session.tree
        if tree is None or not tree.follow(message):
            return [self._new_tree(session, message)]
        return [*tree.resume(), *tree.fork(spare=spare, limit=self._branch_limit(1))]

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Draft one token of every branch."""
        spare = self.engine.spare
        if self._by_text is not None:
            return self._finish_texts(outputs, logits_NV)
        tasks: list[DraftBranch | DraftSession] = [output.request.task for output in outputs]
        branches = [task for task in tasks if isinstance(task, DraftBranch)]
        results = _prefilled(tasks)
        tokens = self._draft(branches, logits_NV, spare=spare)
        self._record_step_time()
        limit = self._branch_limit(len({id(branch.session) for branch in branches}))
        requests: list[ForwardRequest] = []
        while tokens:
            drafted: defaultdict[DraftSession, list[_DraftedToken]] = defaultdict(list)
            for token in tokens:
                drafted[_draft_session(token.branch)].append(token)
            following: list[ForwardRequest] = []
            for session, drafts in drafted.items():
                following += self._step_session(session, drafts, results, spare=spare, limit=limit)
            # What has run already is not requested, and leads to the next token.
            runs = {id(one.task): one for one in following}
            tokens = [
                token.next for token in tokens if token.next and token.has_run(runs, spare=spare)
            ]
            run = {id(token.branch) for token in tokens}
            requests += [one for one in following if id(one.task) not in run]
        self.publish(results)
        return requests

    def _finish_texts(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Draft one token of every text."""
        tasks: list[TextDraft | DraftSession] = [output.request.task for output in outputs]
        texts = [task for task in tasks if isinstance(task, TextDraft)]
        results = _prefilled(tasks)
        drawn = to_list(draw(logits_NV, [text.task() for text in texts])) if texts else []
        requests: list[ForwardRequest] = []
        for text, token in zip(texts, drawn, strict=True):
            session, following = text.session, text.add(int(token))
            if session.closed or session.queued:  # another block is wanted by now
                results.append(Result(session=session))
            elif following is not None:
                requests.append(following)
            else:
                results.append(self._text_result(text))
        self.publish(results)
        return requests

    def _text_result(self, text: TextDraft) -> Result:
        session, now_s = text.session, self.clock()
        message = replace(
            text.proposal(),
            timing=self.timing(session, now_s - session.received_s, now_s=now_s),
            cached_prompt_tokens=self.engine.cached_tokens(session.engine_id),
        )
        return Result(session=session, message=message)

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session whose request failed; of a side branch, drop only that branch."""
        branch: DraftBranch | TextDraft | DraftSession = request.task
        if not isinstance(branch, DraftBranch) or branch.engine_id is None:
            super().fail(request, error)
        elif (tree := _draft_session(branch).tree) and tree.drop_failed(branch):
            self.publish([Result(session=branch.session)])

    def draft(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[DraftToken]:
        """Return the token drafted for each task, from logits in the same order."""
        if self._vocabulary is None:
            return draft_step(logits_NV, tasks)
        logits_NV, lost_N = self._vocabulary.restrict(logits_NV)
        drafts = draft_step(logits_NV, tasks)
        return list(map(with_lost_mass, drafts, to_list(lost_N)))

    def draw(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Tensor:
        """Return the tokens that `draft` returns, for the model, on the device and unread."""
        if self._vocabulary is None:
            return draw(logits_NV, tasks)
        logits_NV, _ = self._vocabulary.restrict(logits_NV)
        return self._vocabulary.drafter_ids(draw(logits_NV, tasks))

    def _draft(
        self, branches: Sequence[DraftBranch], logits_NV: Tensor, *, spare: float
    ) -> list[_DraftedToken]:
        """Return the next token of each branch, and maybe those after it in its block."""

        def tasks(ahead: int) -> list[DraftTask]:
            return [one.task(spare_capacity=spare > 0, ahead=ahead) for one in branches]

        planned = [tasks(0)]
        drafts: Sequence[DraftToken] = ()
        fed: list[list[int]] = []
        reads_each = self.engine.reads_each
        passes = min((one.passes_ahead(reads_each=reads_each) for one in branches), default=0)
        passes = min(passes, _MAX_ROWS // max(1, len(branches)) - 1)
        current = self.engine.current_pass
        is_step = current.tokens <= 2 * current.sessions  # a prefill would count as its passes
        if passes > 0 and is_step and self.engine.decodes_ahead:
            follow = [tasks(1 + number) for number in range(passes)]
            if all(can_draw(task) for task in chain(*planned, *follow)):
                planned += follow
                run = self._draft_each if reads_each else self._draft_ahead
                drafts, fed = run(branches, logits_NV, planned)
        if fed:  # a pass counts its part of the time
            now_s = self.clock()
            began_s = now_s - (now_s - current.began_s) / (1 + len(fed))
            self.engine.current_pass = replace(current, began_s=began_s)
        drafts = drafts or self.draft(logits_NV, planned[0])
        found: list[_DraftedToken] = []
        for index, branch in enumerate(branches):
            token: _DraftedToken | None = None
            for number in reversed(range(1 + len(fed))):
                token = _DraftedToken(
                    branch=branch,
                    draft=drafts[number * len(branches) + index],
                    task=planned[number][index],
                    fed=fed[number][index] if number < len(fed) else None,
                    next=token,
                )
            assert token is not None, "at least one pass has run"
            found.append(token)
        return found

    def _draft_each(
        self,
        branches: Sequence[DraftBranch],
        logits_NV: Tensor,
        planned: Sequence[Sequence[DraftTask]],
    ) -> tuple[Sequence[DraftToken], list[list[int]]]:
        """Draft the branches on, reading each pass, until the block of one ends.

        To plan a pass takes as long as a pass of a small model.

        Args:
            branches: The branches.
            logits_NV: Their logits.
            planned: The tasks of these logits, and of those of each pass that may follow.

        Returns:
            The drafted tokens pass by pass, and those that have run after each but the last.
        """
        count = len(branches)
        drafts = [*self.draft(logits_NV, planned[0])]

        def following() -> Tensor | None:
            if any(one.ends_with(drafts[index::count]) for index, one in enumerate(branches)):
                return None
            ids_N = torch.tensor([draft.token for draft in drafts[-count:]])
            return ids_N if self._vocabulary is None else self._vocabulary.drafter_ids(ids_N)

        def read(drawn_from_NV: Tensor, number: int) -> Tensor | None:
            if invalid_rows(drawn_from_NV):
                return None  # the engine then returns nothing
            drafts.extend(self.draft(drawn_from_NV, planned[1 + number]))
            return following()

        ids_N = following()
        if ids_N is None:
            return drafts, []
        sessions = [one.engine_id or one.session.engine_id for one in branches]
        logits, fed = self.engine.decode_ahead(sessions, ids_N, read, passes=len(planned) - 1)
        if len(drafts) == len(fed) * count:
            read(logits[-1], len(fed) - 1)
        return drafts[: (1 + len(fed)) * count], fed

    def _draft_ahead(
        self,
        branches: Sequence[DraftBranch],
        logits_NV: Tensor,
        planned: Sequence[Sequence[DraftTask]],
    ) -> tuple[Sequence[DraftToken], list[list[int]]]:
        """Run the branches on, with tokens drawn on the device and unread, then draft them all.

        Args:
            branches: The branches.
            logits_NV: Their logits.
            planned: The tasks of these logits, and of those of each pass that may follow.

        Returns:
            The drafted tokens pass by pass, and those that have run after each; nothing if no pass
            has run.
        """
        try:
            logits, fed = self.engine.decode_ahead(
                [one.engine_id or one.session.engine_id for one in branches],
                self.draw(logits_NV, planned[0]),
                lambda drawn_from, number: self.draw(drawn_from, planned[number + 1]),
                passes=len(planned) - 1,
            )
            if not fed:
                return [], []
            tasks = chain.from_iterable(planned[: 1 + len(fed)])
            return self.draft(torch.cat([logits_NV, *logits]), [*tasks]), fed
        # Drafting token by token needs less of the device, and gives the same.
        except Exception:
            log.warning("Tokens are now read one by one: drafting ahead failed", exc_info=True)
            self.engine.decodes_ahead = False
            return [], []

    def _new_tree(self, session: DraftSession, message: Propose) -> ForwardRequest:
        """Start a tree after the committed tokens; return its first forward request."""
        if session.tree is not None:
            session.tree.main.learn_mismatch(session.tokens)
            session.tree.end()
        request = session.forward_request((), num_logits=1, task=None)
        main = DraftBranch(
            session=session,
            message=message,
            tokens=session.engine_tokens,
            limit=self.describe().context_length,
            calibration=self._calibration(session.opened.policy.rule),
            block=PendingBlock(
                position=message.position, digest=message.digest, count=message.count
            ),
        )
        session.tree = DraftTree(
            session=session, engine=self.engine, main=main, ids=self._engine_ids
        )
        return main.begin(request)

    def _calibration(self, rule: Rule) -> Calibration:
        """Return what is known of a rule; that of the rule used longest ago is forgotten."""
        found = self._calibrations[rule] = self._calibrations.pop(rule, None) or Calibration()
        if len(self._calibrations) > MAX_RULES:
            del self._calibrations[next(iter(self._calibrations))]
        return found

    def _step_session(
        self,
        session: DraftSession,
        drafted: Sequence[_DraftedToken],
        results: list[Result],
        *,
        spare: float,
        limit: int,
    ) -> Sequence[ForwardRequest]:
        """Add drafted tokens to the branches of a session; return the requests that follow."""
        tree = session.tree
        assert tree is not None, "a branch is part of a tree"
        drafted = [token for token in drafted if token.branch in tree.in_flight]
        if not drafted:
            return ()
        adopted = tree.sync()
        requests: list[ForwardRequest] = []
        for branch, draft in ((token.branch, token.draft) for token in drafted):
            tree.in_flight.discard(branch)
            if not tree.has(branch):
                continue
            proposal, request = branch.add(draft)
            if request is not None:
                tree.in_flight.add(branch)
                requests.append(request)
            if proposal is not None:
                results.append(self._result(branch, proposal))
        requests += [*tree.resume(), *tree.fork(spare=spare, limit=limit)]
        if not tree.in_flight:
            results.append(Result(session=session))
        if not adopted:
            return requests
        for request in requests:  # through the queue: the engine must adopt the branch first
            self.engine.submit(request)
        return ()

    def _record_step_time(self) -> None:
        """Learn the duration of the current pass, unless it contains a prefill."""
        current = self.engine.current_pass
        if 0 < current.tokens <= 2 * current.sessions:
            self._step_time.learn(tokens=current.tokens, seconds=self.clock() - current.began_s)

    def _branch_limit(self, num_sessions: int) -> int:
        """Return how many side branches a pass has room for, per session."""
        extra = self._step_time.extra_tokens(num_sessions, share=MAX_BRANCH_OVERHEAD)
        return extra // max(1, num_sessions)

    def _result(self, branch: DraftBranch, proposal: Proposal) -> Result:
        session, now_s = branch.session, self.clock()
        service_s = now_s - session.received_s if branch.is_requested(proposal) else 0.0
        message = replace(
            proposal,
            timing=self.timing(session, service_s, now_s=now_s),
            cached_prompt_tokens=self.engine.cached_tokens(session.engine_id),
        )
        return Result(session=session, message=message, done=False)


def _prefilled(tasks: Sequence[object]) -> list[Result]:
    return [Result(session=task, done=False) for task in tasks if isinstance(task, DraftSession)]


def _draft_session(branch: DraftBranch) -> DraftSession:
    assert isinstance(branch.session, DraftSession), "a drafter opens sessions of this class"
    return branch.session
