"""The drafter: writes the next few tokens of a session, one forward pass a token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the next pass's input without leaving the engine's thread. What it writes of a session,
asked and unasked, is a `Line`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cascade.decoding.confidence import Calibration, confidences
from cascade.decoding.cost import Timing
from cascade.decoding.drafting import draft_step
from cascade.errors import InvalidRequest
from cascade.operations.line import Line
from cascade.operations.replica import Replica, Result
from cascade.operations.seat import Seat
from cascade.wire.frames import Propose
from cascade.wire.tiers import DRAFTER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.decoding.drafting import Draft, DraftTask
    from cascade.decoding.rules import Rule
    from cascade.engine.step import Ready, Step
    from cascade.wire.frames import Proposal


class Drafter(Replica[Propose]):
    """A replica of the drafter tier; its engine's head."""

    kind = DRAFTER
    _calibrations: defaultdict[Rule, Calibration]

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._calibrations = defaultdict(Calibration)

    def begin(self, seat: Seat, item: Propose) -> Step | None:
        """Return the step whose row yields the next token, unless the block was sent already."""
        if item.count < 1:
            raise InvalidRequest(
                f"a proposal of {item.count} tokens was asked for; ask for at least 1"
            )
        self.check_room(seat.length, item.count)
        line = seat.line
        if line is not None and line.follow(item):
            return line.resume()
        if line is not None:
            line.refuted(seat.answer)
        seat.line = Line(
            seat=seat,
            asked=item,
            answer=list(seat.answer),
            limit=self.describe().context_length,
            calibration=self._calibrations[seat.session.policy.rule],
        )
        return seat.step((), rows=1, task=seat.line)

    def finish(self, ready: Sequence[Ready], logits_NV: Tensor) -> Sequence[Step]:
        """Draft one token of every line."""
        lines = [one.step.task for one in ready if isinstance(one.step.task, Line)]
        results = [Result(seat=one.step.task) for one in ready if isinstance(one.step.task, Seat)]
        follow: list[Step] = []
        drafts = self.draft(logits_NV, [line.task for line in lines])
        confident = _confidences(logits_NV, lines, drafts)
        for place, (line, draft) in enumerate(zip(lines, drafts, strict=True)):
            proposal, step = None, None
            if line.wanted:
                proposal, step = line.take(draft, confidence=confident.get(place))
            if step is not None:
                follow.append(step)
            if step is None or proposal is not None:
                results.append(self._result(line, proposal, done=step is None))
        self.publish(results)
        return follow

    def draft(self, logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[Draft]:
        """Return the token that each row yields."""
        return draft_step(logits_NV, tasks)

    def seat_of(self, step: Step) -> Seat | None:
        """Return the seat a step belongs to."""
        task = step.task
        return task.seat if isinstance(task, Line) else task

    def _result(self, line: Line, proposal: Proposal | None, *, done: bool) -> Result:
        if proposal is None:
            return Result(seat=line.seat, done=done)
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
        return Result(seat=line.seat, item=item, done=done)


def _confidences(
    logits_NV: Tensor, lines: Sequence[Line], drafts: Sequence[Draft]
) -> dict[int, float]:
    """Return the confidence of the tokens after which a block may end, by their line's place."""
    places = [i for i, line in enumerate(lines) if line.doubts and not line.guessing]
    if not places:
        return {}
    rows_NV = logits_NV if len(places) == len(lines) else logits_NV[places]
    found = confidences(rows_NV, [drafts[i].token for i in places])
    return dict(zip(places, found, strict=True))
