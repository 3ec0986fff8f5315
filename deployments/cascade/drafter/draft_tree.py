"""What a drafter writes of a session while the expert judges: the likeliest outcomes, side by side.

The trunk is the line that what was asked last stands on; it goes on as if all of it stood. Beside
it, each on a session of the engine's own that begins with the trunk's rows, branches write the
block that would be asked for after other likely verdicts: some drafts stand, then the likeliest
other token follows. The branch that a verdict proves right becomes the trunk and keeps its rows;
the rest are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import nlargest
from typing import TYPE_CHECKING

from cascade.protocol.messages import Propose
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.drafter.draft_branch import BranchCandidate, DraftBranch, PendingBlock
    from cascade.engine.engine import Engine
    from cascade.engine.request import ForwardRequest
    from cascade.replica.session import ReplicaSession

LEAST_CHANCE = 0.02  # of a verdict below which no block is drafted on it


@dataclass(slots=True, eq=False, kw_only=True)
class DraftTree:
    """The lines of a session. The engine's thread owns it while the seat is busy, as its lines."""

    seat: ReplicaSession
    engine: Engine
    trunk: DraftBranch
    names: Iterator[int]
    in_flight: set[DraftBranch] = field(init=False)  # lines with a step in flight
    ended: bool = field(init=False, default=False)
    _branches: list[DraftBranch] = field(init=False, default_factory=list["DraftBranch"])
    _grown: PendingBlock | None = field(init=False, default=None)  # block whose branches were made

    def __post_init__(self) -> None:
        self.in_flight = {self.trunk}

    def sync(self) -> bool:
        """Take in what was asked meanwhile; return whether a branch has become the trunk.

        What stands on no line, and the end of the session, end the tree.
        """
        trunk, parked = self.trunk, self.seat.queued
        last = parked[-1] if parked else trunk.asked
        if self.seat.closed or not isinstance(last, Propose) or not self.follow(last):
            self.end()
        return self.trunk is not trunk

    def follow(self, item: Propose) -> bool:
        """Return whether the item asks for a block of a line, which is or becomes the trunk."""
        if self.ended:
            return False
        if item is self.trunk.asked:
            return True
        if self.trunk.follow(item):
            self._drop()
            return True
        chosen = next((line for line in self._branches if line.follow(item)), None)
        if chosen is not None:
            self._adopt(chosen)
        return chosen is not None

    def resume(self) -> list[ForwardRequest]:
        """Return the step of a trunk that rested and has more to write now, if it has."""
        step = None if self.ended or self.trunk in self.in_flight else self.trunk.resume()
        if step is None:
            return []
        self.in_flight.add(self.trunk)
        return [step]

    def has(self, line: DraftBranch) -> bool:
        """Return whether the line may still turn out right."""
        return not self.ended and (line is self.trunk or line in self._branches)

    def grow(self, *, spare: float, most: int) -> list[ForwardRequest]:
        """Return the first steps of the branches beside the trunk, once all is known for them.

        Args:
            spare: The share of the time, and so of the branches wanted, that there is to spare.
            most: Branches that passes have room for.
        """
        if self.ended or not self.trunk.can_branch or self.trunk.first is self._grown:
            return []
        self._grown = self.trunk.first
        count = min(most, round(spare * self.trunk.asked.branches))
        likely = nlargest(count, self.trunk.candidates(), key=_chance) if count else ()
        return [self._fork(one) for one in likely if one.chance >= LEAST_CHANCE]

    def lose(self, line: DraftBranch) -> bool:
        """Drop a branch whose step failed; return whether no line has a step in flight now."""
        flew = line in self.in_flight
        self._drop(line)
        return flew and not self.in_flight

    def end(self) -> None:
        """Drop all; a step of the trunk that is in flight is still heard."""
        self._drop()
        self.ended = True

    def _adopt(self, branch: DraftBranch) -> None:
        """Make a branch the trunk."""
        assert branch.branch is not None, "no trunk is among the branches"
        self.engine.adopt(self.seat.key, branch=branch.branch)
        self._branches.remove(branch)
        self._drop()
        self.in_flight &= {branch}
        self.trunk, branch.branch, self.seat.fed = branch, None, branch.answer

    def _drop(self, *lines: DraftBranch) -> None:
        """Drop branches, all if none is named."""
        for line in lines or tuple(self._branches):
            if line in self._branches and line.branch is not None:
                self._branches.remove(line)
                self.in_flight.discard(line)
                self.engine.release(line.branch)

    def _fork(self, outcome: BranchCandidate) -> ForwardRequest:
        name = SessionId(f"{self.seat.opened.id}/{next(self.names)}")
        line, step = self.trunk.fork(outcome, branch=name)
        self._branches.append(line)
        self.in_flight.add(line)
        return step


def _chance(outcome: BranchCandidate) -> float:
    return outcome.chance
