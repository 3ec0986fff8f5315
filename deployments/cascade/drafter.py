"""The drafter: writes the next few tokens of a session, one forward pass a token.

All sessions of a replica are drafted together: a pass takes whatever waits, and the tokens it
yields are the next pass's input without leaving the engine's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.decoding.drafting import Draft, DraftTask, block_of, defers_alone, draft_step
from cascade.decoding.needs import wants_target
from cascade.engine.step import Step
from cascade.errors import InvalidRequest
from cascade.operations.replica import Replica, Result
from cascade.operations.seat import Seat
from cascade.wire.frames import Proposal, Propose
from cascade.wire.tiers import DRAFTER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.step import Ready


@dataclass(slots=True, eq=False, kw_only=True)
class _Drafting:
    """A block in the making."""

    seat: Seat
    item: Propose
    answer: list[int]  # committed and drafted tokens
    drafts: list[Draft] = field(default_factory=list[Draft])
    deferred: bool = False

    @property
    def task(self) -> DraftTask:
        session = self.seat.session
        return DraftTask(
            policy=session.policy,
            position=len(self.answer),
            start=self.item.position,
            prompt=session.prompt,
            answer=self.answer,
        )

    def take(self, draft: Draft) -> Step | None:
        """Add a draft; return the step that leads to the next one, or None at the block's end."""
        policy = self.seat.session.policy
        if self.item.until_deferral and defers_alone(policy, draft):
            self.deferred = True
            return None
        self.drafts.append(draft)
        wanted = self.item.count + wants_target(policy)
        if len(self.drafts) == wanted or draft.token in policy.stop_ids:
            return None
        base = len(self.seat.session.prompt) + len(self.answer)
        self.answer.append(draft.token)
        self.seat.fed.append(draft.token)
        return Step(session=self.seat.key, base=base, tokens=(draft.token,), rows=1, task=self)

    def proposal(self, *, cached_prompt_tokens: int) -> Proposal:
        """Return the block, and the row after it if the bonus is drawn from there."""
        length = min(len(self.drafts), self.item.count)
        return Proposal(
            session_id=self.item.session_id,
            epoch=self.item.epoch,
            position=self.item.position,
            block=block_of(self.drafts, length=length),
            deferred=self.deferred,
            passes=len(self.drafts) + self.deferred,
            cached_prompt_tokens=cached_prompt_tokens,
        )


class Drafter(Replica[Propose]):
    """A replica of the drafter tier; its engine's head."""

    kind = DRAFTER

    def begin(self, seat: Seat, item: Propose) -> Step:
        """Return the step whose row yields the first drafted token."""
        if item.count < 1:
            raise InvalidRequest(
                f"a proposal of {item.count} tokens was asked for; ask for at least 1"
            )
        self.check_room(seat.length, item.count)
        return seat.step((), rows=1, task=_Drafting(seat=seat, item=item, answer=list(seat.answer)))

    def finish(self, ready: Sequence[Ready], logits_NV: Tensor) -> Sequence[Step]:
        """Draft one token of every block in the making."""
        blocks = [one.step.task for one in ready if isinstance(one.step.task, _Drafting)]
        results = [Result(seat=one.step.task) for one in ready if isinstance(one.step.task, Seat)]
        follow: list[Step] = []
        drafts = draft_step(logits_NV, [block.task for block in blocks])
        for block, draft in zip(blocks, drafts, strict=True):
            step = None if block.seat.closed else block.take(draft)
            if step is not None:
                follow.append(step)
                continue
            cached = self.engine.cached_tokens(block.seat.key)
            results.append(
                Result(seat=block.seat, item=block.proposal(cached_prompt_tokens=cached))
            )
        self.publish(results)
        return follow

    def seat_of(self, step: Step) -> Seat | None:
        """Return the seat a step belongs to."""
        task = step.task
        return task.seat if isinstance(task, _Drafting) else task
