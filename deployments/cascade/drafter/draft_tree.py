"""All that a drafter drafts of one session while the expert verifies: its most likely outcomes.

The main branch continues the last requested block as if all of it were accepted. Beside it, other
branches draft the block that would be requested after other likely verdicts: some drafts are
accepted, then the likeliest other token follows. Each such branch has an engine session of its own
that starts with the main branch's KV cache. The branch that a verdict confirms becomes the main
branch and keeps its cache; the others are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter
from typing import TYPE_CHECKING

from cascade.protocol.messages import Propose
from cascade.replica.session import ReplicaSession
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cascade.drafter.draft_branch import BranchCandidate, DraftBranch, PendingBlock
    from cascade.engine.engine import Engine
    from cascade.engine.request import ForwardRequest
    from cascade.engine.vocabulary import VocabularyMap

MIN_PROB = 0.02  # of a verdict, below which no block is drafted for it


@dataclass(slots=True, eq=False, kw_only=True)
class DraftSession(ReplicaSession):
    """A session on a drafter: its committed tokens, and the branches drafted after them."""

    tree: DraftTree | None = None  # since the first Propose
    vocabulary_map: VocabularyMap | None = None  # None: the drafter has the expert's tokens
    own_prompt: Sequence[int] = ()  # in the drafter's tokens, if there is a map
    own_source: Sequence[int] = ()  # the same of an encoder-decoder

    @property
    def engine_prompt(self) -> Sequence[int]:
        """Return the prompt in the drafter's tokens."""
        return self.opened.prompt if self.vocabulary_map is None else self.own_prompt

    @property
    def engine_source(self) -> Sequence[int]:
        """Return what an encoder reads in the drafter's tokens."""
        return self.opened.source if self.vocabulary_map is None else self.own_source

    def to_engine(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return tokens of the answer in the drafter's."""
        return tokens if self.vocabulary_map is None else self.vocabulary_map.to_drafter(tokens)

    def translate_prompt(self) -> None:
        """Say the prompt in the drafter's tokens.

        The prompt of an encoder-decoder is its source; what begins its answers has the same ids in
        both models.
        """
        if self.vocabulary_map is None:
            return
        if self.opened.source:
            self.own_source = self.vocabulary_map.prompt_to_drafter(self.opened.source)
            self.own_prompt = self.opened.prompt
        else:
            self.own_prompt = self.vocabulary_map.prompt_to_drafter(self.opened.prompt)


@dataclass(slots=True, eq=False, kw_only=True)
class DraftTree:
    """The branches of a session; owned like them by one thread at a time."""

    session: ReplicaSession
    engine: Engine
    main: DraftBranch
    ids: Iterator[int]  # for engine sessions, each used once
    in_flight: set[DraftBranch] = field(init=False)  # branches with a forward request in flight
    ended: bool = field(init=False, default=False)
    _others: list[DraftBranch] = field(init=False, default_factory=list["DraftBranch"])
    _forked: PendingBlock | None = field(init=False, default=None)  # the last block forked from

    def __post_init__(self) -> None:
        self.in_flight = {self.main}

    def sync(self) -> bool:
        """Apply the messages queued meanwhile; return whether another branch became the main one.

        The tree ends with its session, or when the last message continues no branch.
        """
        main, queued = self.main, self.session.queued
        last = queued[-1] if queued else main.message
        if self.session.closed or not isinstance(last, Propose) or not self.follow(last):
            self.end()
        return self.main is not main

    def follow(self, message: Propose) -> bool:
        """Return whether the message requests a block of a branch, which becomes the main one."""
        if self.ended:
            return False
        if message is self.main.message:
            return True
        if self.main.follow(message):
            self._drop()
            return True
        confirmed = next((branch for branch in self._others if branch.follow(message)), None)
        if confirmed is not None:
            self._adopt(confirmed)
        return confirmed is not None

    def resume(self) -> list[ForwardRequest]:
        """Return the next forward request of a paused main branch that has more to draft now."""
        request = None if self.ended or self.main in self.in_flight else self.main.resume()
        if request is None:
            return []
        self.in_flight.add(self.main)
        return [request]

    def has(self, branch: DraftBranch) -> bool:
        """Return whether the branch may still be confirmed."""
        return not self.ended and (branch is self.main or branch in self._others)

    def fork(self, *, spare: float, limit: int) -> list[ForwardRequest]:
        """Return the first requests of new branches, once the requested block is complete.

        Args:
            spare: Share of the drafter's time that is free, and of the wanted branches to make.
            limit: Most branches that a forward pass has room for.
        """
        if self.ended or not self.main.can_fork or self.main.requested is self._forked:
            return []
        self._forked = self.main.requested
        count = min(limit, round(spare * self.main.message.branches))
        likely = nlargest(count, self.main.candidates(), key=attrgetter("prob")) if count else ()
        return [self._fork(one) for one in likely if one.prob >= MIN_PROB]

    def drop_failed(self, branch: DraftBranch) -> bool:
        """Drop a branch whose request failed; return whether that was the last in flight."""
        was_in_flight = branch in self.in_flight
        self._drop(branch)
        return was_in_flight and not self.in_flight

    def end(self) -> None:
        """Drop all other branches; a request of the main one may still be in flight."""
        self._drop()
        self.ended = True

    def _adopt(self, branch: DraftBranch) -> None:
        """Make a branch the main one."""
        assert branch.engine_id is not None, "the main branch is not among the others"
        self.engine.adopt(self.session.engine_id, branch=branch.engine_id)
        self._others.remove(branch)
        self._drop()
        self.in_flight &= {branch}
        self.main, branch.engine_id, self.session.engine_tokens = branch, None, branch.tokens

    def _drop(self, *branches: DraftBranch) -> None:
        """Drop some other branches, all if none is named."""
        for branch in branches or tuple(self._others):
            if branch in self._others and branch.engine_id is not None:
                self._others.remove(branch)
                self.in_flight.discard(branch)
                self.engine.release(branch.engine_id)

    def _fork(self, candidate: BranchCandidate) -> ForwardRequest:
        engine_id = SessionId(f"{self.session.opened.id}/{next(self.ids)}")
        branch, request = self.main.fork(candidate, engine_id=engine_id)
        self._others.append(branch)
        self.in_flight.add(branch)
        return request
