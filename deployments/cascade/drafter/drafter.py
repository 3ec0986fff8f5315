"""The drafter: drafts the next tokens of sessions, one forward pass per token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the input of the next pass without leaving the engine's thread. All that is drafted of a
session, on request or ahead, is its `DraftTree`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cascade.drafter.draft_branch import DraftBranch, PendingBlock
from cascade.drafter.draft_tree import DraftSession, DraftTree
from cascade.errors import InvalidRequest
from cascade.protocol.messages import Propose
from cascade.protocol.services import DRAFTER
from cascade.replica.replica import Replica, Result
from cascade.speculation.confidence import Calibration
from cascade.speculation.cost_model import StepTime
from cascade.speculation.draft import draft_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import ForwardRequest, LogitsOutput
    from cascade.protocol.messages import Proposal
    from cascade.replica.session import ReplicaSession
    from cascade.rules import Rule
    from cascade.speculation.draft import DraftTask, DraftToken

MAX_BRANCH_OVERHEAD = 1.0  # share of its time by which branches may lengthen a pass
MAX_RULES = 1024  # whose calibrations are kept: callers choose the parameters of rules


class Drafter(Replica[Propose]):
    """A replica of the drafter tier; its engine's logits handler."""

    kind = DRAFTER
    session_class = DraftSession

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._calibrations: dict[Rule, Calibration] = {}
        self._step_time = StepTime()  # of passes of a token or two per session

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
        self.check_context(session.num_tokens, 1)
        room = self.describe().context_length - session.num_tokens
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
        tasks: list[DraftBranch | DraftSession] = [output.request.task for output in outputs]
        branches = [task for task in tasks if isinstance(task, DraftBranch)]
        results = [Result(session=task) for task in tasks if isinstance(task, DraftSession)]
        drafts = self.draft(logits_NV, [one.task(spare_capacity=spare > 0) for one in branches])
        self._record_step_time()
        drafted: defaultdict[DraftSession, list[tuple[DraftBranch, DraftToken]]] = defaultdict(list)
        for branch, draft in zip(branches, drafts, strict=True):
            drafted[_draft_session(branch)].append((branch, draft))
        requests: list[ForwardRequest] = []
        limit = self._branch_limit(len(drafted))
        for session, pairs in drafted.items():
            requests += self._step_session(session, pairs, results, spare=spare, limit=limit)
        self.publish(results)
        return requests

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session whose request failed; of a side branch, drop only that branch."""
        branch: DraftBranch | DraftSession = request.task
        if isinstance(branch, DraftSession) or branch.engine_id is None:
            super().fail(request, error)
        elif (tree := _draft_session(branch).tree) and tree.drop_failed(branch):
            self.publish([Result(session=branch.session)])

    def draft(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[DraftToken]:
        """Return the token drafted for each task, from logits in the same order."""
        return draft_step(logits_NV, tasks)

    def _new_tree(self, session: DraftSession, message: Propose) -> ForwardRequest:
        """Start a tree after the committed tokens; return its first forward request."""
        if session.tree is not None:
            session.tree.main.learn_mismatch(session.tokens)
            session.tree.end()
        request = session.forward_request((), num_logits=1, task=None)
        request.task = main = DraftBranch(
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
        return request

    def _calibration(self, rule: Rule) -> Calibration:
        """Return what is known of a rule; that of the rule used longest ago is forgotten."""
        found = self._calibrations[rule] = self._calibrations.pop(rule, None) or Calibration()
        if len(self._calibrations) > MAX_RULES:
            del self._calibrations[next(iter(self._calibrations))]
        return found

    def _step_session(
        self,
        session: DraftSession,
        drafted: Sequence[tuple[DraftBranch, DraftToken]],
        results: list[Result],
        *,
        spare: float,
        limit: int,
    ) -> Sequence[ForwardRequest]:
        """Add drafted tokens to the branches of a session; return the requests that follow."""
        tree = session.tree
        assert tree is not None, "a branch is part of a tree"
        drafted = [(branch, draft) for branch, draft in drafted if branch in tree.in_flight]
        if not drafted:
            return ()
        adopted = tree.sync()
        requests: list[ForwardRequest] = []
        for branch, draft in drafted:
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
            timing=self.timing(service_s, now_s=now_s),
            cached_prompt_tokens=self.engine.cached_tokens(session.engine_id),
        )
        return Result(session=session, message=message, done=False)


def _draft_session(branch: DraftBranch) -> DraftSession:
    assert isinstance(branch.session, DraftSession), "a drafter opens sessions of this class"
    return branch.session
