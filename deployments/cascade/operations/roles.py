"""Who drafts and who judges. A mode of the server is one choice of each over the router's loop.

| mode | drafter | expert |
|---|---|---|
| expert_only | Silent | Judging |
| drafter_only | Drafting | Absent |
| token_cascade | Drafting until it defers | Late |
| speculative, cascade | Hurried | Judging |
| the same, rule of the drafter alone | Hurried until it defers | Late |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cascade.decoding.cost import Timing
from cascade.decoding.session import Block, Origin, Session, Verdict, advance
from cascade.wire.frames import Judge, Judgement, Proposal, Propose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.decoding.draft_length import Length
    from cascade.decoding.session import Policy
    from cascade.operations.places import Answer, Place, Question

LIKELY = 0.2  # chance of a block's standing below which drafting on from its end is in vain
ALIGNMENT = 3  # committed tokens that must recur in a prediction to take it up again


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A block on its way to whoever judges."""

    block: Block = field(default_factory=Block)
    deferred: bool = False  # the drafter's own rule gives the next token to the expert
    passes: int = 0  # of the drafter
    timing: Timing = field(default_factory=Timing)
    predicted: bool = False  # the client's own words
    branched: bool = False  # drafted in advance, on another guess than that all before it stands


NOTHING = Offer()
"""The expert writes the next token itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A verdict, and what it took."""

    verdict: Verdict
    timing: Timing = field(default_factory=Timing)


class Drafter(Protocol):
    """Proposes blocks."""

    def hint(self, session: Session, wanted: Length) -> None:
        """Hear what `propose` will be asked next, to begin with it if that takes no waiting."""
        ...

    async def propose(self, session: Session, wanted: Length) -> Offer:
        """Return a block no longer than is wanted after the session's; none is an answer."""
        ...

    def hear(self, policy: Policy, offer: Offer, verdict: Verdict) -> None:
        """Hear what became of a block."""
        ...


class Expert(Protocol):
    """Judges blocks."""

    async def judge(self, session: Session, offer: Offer, *, room: int, alone: int) -> Judged:
        """Return the verdict; at most `room` tokens of it will be committed.

        Where nothing is offered, the expert goes on by itself until it has written `alone` tokens.
        """
        ...


class Silent:
    """Never drafts."""

    def hint(self, session: Session, wanted: Length) -> None:
        """Think nothing of it."""

    async def propose(self, session: Session, wanted: Length) -> Offer:
        """Return nothing."""
        del session, wanted
        return NOTHING

    def hear(self, policy: Policy, offer: Offer, verdict: Verdict) -> None:
        """Think nothing of it."""


class Drafting:
    """Drafts on a replica of the drafter tier, `ahead` blocks ahead of the expert.

    It also drafts on up to `branches` other verdicts than that all stands.
    """

    def __init__(
        self, place: Place, *, ahead: int = 0, branches: int = 0, until_deferral: bool = False
    ) -> None:
        self.place = place
        self._ahead = ahead
        self._branches = branches
        self._until_deferral = until_deferral

    def hint(self, session: Session, wanted: Length) -> None:
        """Ask for the block in advance."""
        if wanted.tokens:
            self.place.hint(session, self.question(session, wanted))

    async def propose(self, session: Session, wanted: Length) -> Offer:
        """Return the replica's block; raises DrafterUnavailable when none is left."""
        if wanted.tokens == 0:
            return NOTHING
        return self.offer(await self.place.ask(session, self.question(session, wanted)), wanted)

    def hear(self, policy: Policy, offer: Offer, verdict: Verdict) -> None:
        """Think nothing of it."""

    def question(self, session: Session, wanted: Length) -> Question:
        """Return what builds the question for a block."""

        def item(epoch: int, digest: int, lacking: tuple[int, ...]) -> Propose:
            return Propose(
                session_id=session.id,
                epoch=epoch,
                position=session.position,
                digest=digest,
                count=wanted.tokens,
                tokens=lacking,
                until_deferral=self._until_deferral,
                ahead=self._ahead if wanted.whole >= LIKELY else 0,
                floor=wanted.floor,
                branches=self._branches,
            )

        return item

    def offer(self, answer: Answer, wanted: Length) -> Offer:
        """Return the block that the replica answered with."""
        assert isinstance(answer, Proposal), "a drafter answers Propose with a Proposal"
        block = answer.block.cut(wanted.tokens)
        deferred = answer.deferred and block is answer.block
        return Offer(
            block=block,
            deferred=deferred,
            passes=answer.passes,
            timing=answer.timing,
            branched=answer.branched,
        )


class Predicted:
    """Proposes from the client's prediction, and asks `other` where that does not fit.

    A prediction costs no drafting, so blocks of it are long even where drafting would not pay.
    """

    def __init__(
        self, prediction: Sequence[int], other: Drafter, *, block_tokens: int, limit: int
    ) -> None:
        self._prediction = tuple(prediction)
        self._other = other
        self._block_tokens = block_tokens
        self._limit = limit  # position that no block goes beyond
        self._next = 0  # place in the prediction of the session's next token
        self._seen = 0  # committed tokens looked at

    def hint(self, session: Session, wanted: Length) -> None:
        """Tell the other if it is its turn."""
        if not self._predicted(session):
            self._other.hint(session, wanted)

    async def propose(self, session: Session, wanted: Length) -> Offer:
        """Return the prediction's next tokens while the answer follows it."""
        tokens = self._predicted(session)
        if not tokens:
            return await self._other.propose(session, wanted)
        return Offer(block=Block(tokens=tokens), predicted=True)

    def hear(self, policy: Policy, offer: Offer, verdict: Verdict) -> None:
        """Tell the other of its own blocks."""
        if not offer.predicted:
            self._other.hear(policy, offer, verdict)

    def _predicted(self, session: Session) -> tuple[int, ...]:
        self._follow(session.tokens)
        count = max(0, min(self._block_tokens, self._limit - session.position))
        return self._prediction[self._next : self._next + count]

    def _follow(self, committed: tuple[int, ...]) -> None:
        fresh = committed[self._seen :]
        self._seen = len(committed)
        if fresh == self._prediction[self._next : self._next + len(fresh)]:
            self._next += len(fresh)
            return
        tail = committed[-ALIGNMENT:]
        for start in range(len(self._prediction) - ALIGNMENT + 1):
            if self._prediction[start : start + ALIGNMENT] == tail:
                self._next = start + ALIGNMENT
                return
        self._next = len(self._prediction)


class Judging:
    """Judges on a replica of the expert tier; what it writes alone is streamed."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._coming = 0  # verdicts the replica sends without being asked
        self._next_position = 0  # of the first of them

    async def judge(self, session: Session, offer: Offer, *, room: int, alone: int) -> Judged:
        """Return the replica's verdict; raises ExpertUnavailable when none is left."""
        block = offer.block
        coming = self._coming > 0 and session.position == self._next_position and not block.length
        if coming:
            self._coming -= 1
        else:
            self._coming = 0 if block.length else max(0, min(alone, room) - 1)
        ahead = self._coming

        def item(epoch: int, digest: int, lacking: tuple[int, ...]) -> Judge:
            return Judge(
                session_id=session.id,
                epoch=epoch,
                position=session.position,
                digest=digest,
                block=block,
                tokens=lacking,
                ahead=ahead,
            )

        return self._take(await self._place.ask(session, item, coming=coming))

    def _take(self, answer: object) -> Judged:
        assert isinstance(answer, Judgement), "an expert answers Judge with a Judgement"
        self._place.judged(len(answer.verdict.tokens))
        self._next_position = answer.position + len(answer.verdict.tokens)
        return Judged(verdict=answer.verdict, timing=answer.timing)


class Absent:
    """Keeps whatever was drafted: no expert is asked."""

    async def judge(self, session: Session, offer: Offer, *, room: int, alone: int) -> Judged:
        """Return the whole block, kept."""
        del session, room, alone
        return Judged(verdict=_kept(offer.block))


class Late:
    """Keeps what was drafted, and asks the expert for one token where the drafter defers."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert

    async def judge(self, session: Session, offer: Offer, *, room: int, alone: int) -> Judged:
        """Return the kept tokens, and the expert's next one after a deferral.

        Where nothing was drafted at all, the expert goes on alone.
        """
        kept = _kept(offer.block)
        if room <= kept.accepted or (kept.accepted and not offer.deferred):
            return Judged(verdict=replace(kept, judged=kept.accepted))
        ahead = advance(session, kept, limit=session.position + room)
        alone = 1 if offer.deferred else alone
        judged = await self._expert.judge(ahead, NOTHING, room=room - kept.accepted, alone=alone)
        verdict = Verdict(
            accepted=kept.accepted,
            tokens=kept.tokens + judged.verdict.tokens,
            origins=kept.origins + judged.verdict.origins,
            judged=kept.accepted + offer.deferred,
            deferred=int(offer.deferred),
            logprobs=kept.logprobs + judged.verdict.logprobs,
        )
        return Judged(verdict=verdict, timing=judged.timing)


def _kept(block: Block) -> Verdict:
    return Verdict(
        accepted=block.length,
        tokens=block.tokens,
        origins=(Origin.KEPT,) * block.length,
        logprobs=block.logprobs,
    )
