"""The drafter: writes the next few tokens of a session, one forward pass a token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the next pass's input without leaving the engine's thread. What it writes of a session,
asked and unasked, is a `Tree` of lines.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cascade.drafter.draft_branch import Line, Making
from cascade.drafter.draft_tree import Tree
from cascade.drafter.session import DraftSession
from cascade.errors import InvalidRequest
from cascade.protocol.messages import Propose
from cascade.protocol.services import DRAFTER
from cascade.replica.replica import Replica, Result
from cascade.replica.session import Seat
from cascade.speculation.confidence import Calibration
from cascade.speculation.cost_model import StepTime, Timing
from cascade.speculation.draft import draft_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import Ready, Step
    from cascade.protocol.messages import Proposal
    from cascade.rules import Rule
    from cascade.speculation.draft import Draft, DraftTask

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

    def begin(self, seat: Seat, item: Propose) -> Sequence[Step]:
        """Return the steps whose rows yield the next tokens, unless those were sent already."""
        if item.count < 1:
            raise InvalidRequest(
                f"a proposal of {item.count} tokens was asked for; ask for at least 1"
            )
        self.check_room(seat.length, item.count)
        spare, tree = self.engine.spare, _tree_of(seat)
        if tree is None or not tree.follow(item):
            return [self._plant(seat, item)]
        return [*tree.resume(), *tree.grow(spare=spare, most=self._room(1))]

    def finish(self, ready: Sequence[Ready], logits_NV: Tensor) -> Sequence[Step]:
        """Draft one token of every line."""
        spare = self.engine.spare
        lines = [one.step.task for one in ready if isinstance(one.step.task, Line)]
        results = [Result(seat=one.step.task) for one in ready if isinstance(one.step.task, Seat)]
        drafts = self.draft(logits_NV, [line.task(curious=spare > 0) for line in lines])
        self._time()
        turns: defaultdict[Seat, list[tuple[Line, Draft]]] = defaultdict(list)
        for line, draft in zip(lines, drafts, strict=True):
            turns[line.seat].append((line, draft))
        follow: list[Step] = []
        room = self._room(len(turns))
        for seat, turn in turns.items():
            follow += self._turn(seat, turn, results, spare=spare, room=room)
        self.publish(results)
        return follow

    def fail(self, step: Step, error: Exception) -> None:
        """Refuse the session whose step cannot run; a branch is given up in silence."""
        line = step.task
        tree = _tree_of(line.seat) if isinstance(line, Line) and line.branch is not None else None
        if tree is None:
            super().fail(step, error)
        elif tree.lose(line):
            self.publish([Result(seat=line.seat)])

    def draft(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[Draft]:
        """Return the token that each row yields."""
        return draft_step(logits_NV, tasks)

    def seat_of(self, step: Step) -> Seat | None:
        """Return the seat a step belongs to."""
        task = step.task
        return task.seat if isinstance(task, Line) else task

    def _plant(self, seat: Seat, item: Propose) -> Step:
        """Begin a line after the answer; return its first step."""
        assert isinstance(seat, DraftSession), "a drafter opens sessions of this class"
        if seat.tree is not None:
            seat.tree.trunk.refuted(seat.answer)
            seat.tree.end()
        step = seat.step((), rows=1, task=None)
        step.task = line = Line(
            seat=seat,
            asked=item,
            answer=seat.fed,
            limit=self.describe().context_length,
            calibration=self._calibrations[seat.session.policy.rule],
            block=Making(position=item.position, digest=item.digest, count=item.count),
        )
        seat.tree = Tree(seat=seat, engine=self.engine, trunk=line, names=self._keys)
        return step

    def _turn(
        self,
        seat: Seat,
        turn: Sequence[tuple[Line, Draft]],
        results: list[Result],
        *,
        spare: float,
        room: int,
    ) -> Sequence[Step]:
        """Give the lines of a seat their tokens; return the steps that follow at once."""
        tree = _tree_of(seat)
        heard = [] if tree is None else [one for one in turn if one[0] in tree.flying]
        if tree is None or not heard:
            return ()
        adopted = tree.heed()
        follow: list[Step] = []
        for line, draft in heard:
            tree.flying.discard(line)
            if not tree.has(line):
                continue
            proposal, step = line.take(draft)
            if step is not None:
                tree.flying.add(line)
                follow.append(step)
            if proposal is not None:
                results.append(self._result(line, proposal))
        follow += [*tree.resume(), *tree.grow(spare=spare, most=room)]
        if not tree.flying:
            results.append(Result(seat=seat))
        if not adopted:
            return follow
        for step in follow:
            self.engine.submit(step)
        return ()

    def _time(self) -> None:
        """Learn what the pass in hand took, unless it read a prompt."""
        current = self.engine.current
        if 0 < current.tokens <= 2 * current.sessions:
            seconds = self.clock() - current.began_s
            self._passes.learn(tokens=current.tokens, seconds=seconds)

    def _room(self, sessions: int) -> int:
        """Return how many branches each of so many sessions may have in a pass beside them all."""
        return self._passes.more(sessions, share=STRETCH) // max(1, sessions)

    def _result(self, line: Line, proposal: Proposal) -> Result:
        now_s, current = self.clock(), self.engine.current
        timing = Timing(
            service_s=now_s - line.seat.asked_s if line.is_asked(proposal) else 0.0,
            step_s=now_s - current.began_s,
            tokens=current.tokens,
            sessions=current.sessions,
            open=self.sessions,
        )
        cached = self.engine.cached_tokens(line.seat.key)
        item = replace(proposal, timing=timing, cached_prompt_tokens=cached)
        return Result(seat=line.seat, item=item, done=False)


def _tree_of(seat: Seat) -> Tree | None:
    assert isinstance(seat, DraftSession), "a drafter opens sessions of this class"
    return seat.tree
