"""The drafter: writes the next few tokens of a session, one forward pass a token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the next pass's input without leaving the engine's thread. What it writes of a session,
asked and unasked, is a `Tree` of lines.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cascade.drafter.draft_branch import DraftBranch, PendingBlock
from cascade.drafter.draft_tree import DraftTree
from cascade.drafter.session import DraftSession
from cascade.errors import InvalidRequest
from cascade.protocol.messages import Propose
from cascade.protocol.services import DRAFTER
from cascade.replica.replica import Replica, Result
from cascade.replica.session import ReplicaSession
from cascade.speculation.confidence import Calibration
from cascade.speculation.cost_model import StepTime, Timing
from cascade.speculation.draft import draft_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import ForwardRequest, LogitsOutput
    from cascade.protocol.messages import Proposal
    from cascade.rules import Rule
    from cascade.speculation.draft import DraftTask, DraftToken

STRETCH = 1.0  # of a pass: by how much of its time branches may lengthen it


class Drafter(Replica[Propose]):
    """A replica of the drafter tier; its engine's head."""

    kind = DRAFTER
    session_class = DraftSession
    _calibrations: defaultdict[Rule, Calibration]
    _passes: StepTime  # of a token or two a session, with what is done with their rows

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._calibrations = defaultdict(Calibration)
        self._passes = StepTime()

    def begin(self, seat: ReplicaSession, item: Propose) -> Sequence[ForwardRequest]:
        """Return the steps whose rows yield the next tokens, unless those were sent already."""
        if item.count < 1:
            raise InvalidRequest(
                f"a proposal of {item.count} tokens was asked for; ask for at least 1"
            )
        self.check_context(seat.length, item.count)
        spare, tree = self.engine.spare, _tree_of(seat)
        if tree is None or not tree.follow(item):
            return [self._new_tree(seat, item)]
        return [*tree.resume(), *tree.grow(spare=spare, most=self._branch_budget(1))]

    def finish(self, outputs: Sequence[LogitsOutput], logits_NV: Tensor) -> Sequence[ForwardRequest]:
        """Draft one token of every line."""
        spare = self.engine.spare
        lines = [one.request.task for one in outputs if isinstance(one.request.task, DraftBranch)]
        results = [
            Result(session=one.request.task)
            for one in outputs
            if isinstance(one.request.task, ReplicaSession)
        ]
        drafts = self.draft(logits_NV, [line.task(curious=spare > 0) for line in lines])
        self._record_step_time()
        turns: defaultdict[ReplicaSession, list[tuple[DraftBranch, DraftToken]]] = defaultdict(list)
        for line, draft in zip(lines, drafts, strict=True):
            turns[line.seat].append((line, draft))
        follow: list[ForwardRequest] = []
        room = self._branch_budget(len(turns))
        for seat, turn in turns.items():
            follow += self._step_session(seat, turn, results, spare=spare, room=room)
        self.publish(results)
        return follow

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session whose step cannot run; a branch is given up in silence."""
        line = request.task
        tree = (
            _tree_of(line.seat)
            if isinstance(line, DraftBranch) and line.branch is not None
            else None
        )
        if tree is None:
            super().fail(request, error)
        elif tree.lose(line):
            self.publish([Result(session=line.seat)])

    def draft(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[DraftToken]:
        """Return the token that each row yields."""
        return draft_step(logits_NV, tasks)

    def session_of(self, step: ForwardRequest) -> ReplicaSession | None:
        """Return the seat a step belongs to."""
        task = step.task
        return task.seat if isinstance(task, DraftBranch) else task

    def _new_tree(self, seat: ReplicaSession, item: Propose) -> ForwardRequest:
        """Begin a line after the answer; return its first step."""
        assert isinstance(seat, DraftSession), "a drafter opens sessions of this class"
        if seat.tree is not None:
            seat.tree.trunk.learn_mismatch(seat.answer)
            seat.tree.end()
        step = seat.step((), rows=1, task=None)
        step.task = line = DraftBranch(
            seat=seat,
            asked=item,
            answer=seat.fed,
            limit=self.describe().context_length,
            calibration=self._calibrations[seat.opened.policy.rule],
            block=PendingBlock(position=item.position, digest=item.digest, count=item.count),
        )
        seat.tree = DraftTree(seat=seat, engine=self.engine, trunk=line, names=self._keys)
        return step

    def _step_session(
        self,
        seat: ReplicaSession,
        turn: Sequence[tuple[DraftBranch, DraftToken]],
        results: list[Result],
        *,
        spare: float,
        room: int,
    ) -> Sequence[ForwardRequest]:
        """Give the lines of a seat their tokens; return the steps that follow at once."""
        tree = _tree_of(seat)
        heard = [] if tree is None else [one for one in turn if one[0] in tree.in_flight]
        if tree is None or not heard:
            return ()
        adopted = tree.sync()
        follow: list[ForwardRequest] = []
        for line, draft in heard:
            tree.in_flight.discard(line)
            if not tree.has(line):
                continue
            proposal, step = line.take(draft)
            if step is not None:
                tree.in_flight.add(line)
                follow.append(step)
            if proposal is not None:
                results.append(self._result(line, proposal))
        follow += [*tree.resume(), *tree.grow(spare=spare, most=room)]
        if not tree.in_flight:
            results.append(Result(session=seat))
        if not adopted:
            return follow
        for step in follow:
            self.engine.submit(step)
        return ()

    def _record_step_time(self) -> None:
        """Learn what the pass in hand took, unless it read a prompt."""
        current = self.engine.current_pass
        if 0 < current.tokens <= 2 * current.sessions:
            seconds = self.clock() - current.began_s
            self._passes.learn(tokens=current.tokens, seconds=seconds)

    def _branch_budget(self, sessions: int) -> int:
        """Return how many branches each of so many sessions may have in a pass beside them all."""
        return self._passes.more(sessions, share=STRETCH) // max(1, sessions)

    def _result(self, line: DraftBranch, proposal: Proposal) -> Result:
        now_s, current = self.clock(), self.engine.current_pass
        timing = Timing(
            service_s=now_s - line.seat.asked_s if line.is_asked(proposal) else 0.0,
            step_s=now_s - current.began_s,
            tokens=current.tokens,
            sessions=current.sessions,
            open=self.sessions,
        )
        cached = self.engine.cached_tokens(line.seat.key)
        item = replace(proposal, timing=timing, cached_prompt_tokens=cached)
        return Result(session=line.seat, item=item, done=False)


def _tree_of(seat: ReplicaSession) -> DraftTree | None:
    assert isinstance(seat, DraftSession), "a drafter opens sessions of this class"
    return seat.tree
