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

from cascade.protocol.messages import Judge, Judgement
from cascade.router.drafters import NO_DRAFT
from cascade.speculation.cost_model import Timing
from cascade.types import Block, Origin, Session, Verdict, advance

if TYPE_CHECKING:
    from cascade.router.drafters import Draft
    from cascade.router.tier_session import TierSession


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """A verdict, and what it took."""

    verdict: Verdict
    timing: Timing = field(default_factory=Timing)


class Verifier(Protocol):
    """Judges blocks."""

    async def verify(
        self, session: Session, offer: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the verdict; at most `room` tokens of it will be committed.

        Where nothing is offered, the expert goes on by itself until it has written `alone` tokens.
        """
        ...


class RemoteVerifier:
    """Judges on a replica of the expert tier; what it writes alone is streamed."""

    def __init__(self, place: TierSession) -> None:
        self._place = place
        self._coming = 0  # verdicts the replica sends without being asked
        self._next_position = 0  # of the first of them

    async def verify(
        self, session: Session, offer: Draft, *, room: int, alone: int
    ) -> VerifyResult:
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

    def _take(self, answer: object) -> VerifyResult:
        assert isinstance(answer, Judgement), "an expert answers Judge with a Judgement"
        self._place.record_verdict(len(answer.verdict.tokens))
        self._next_position = answer.position + len(answer.verdict.tokens)
        return VerifyResult(verdict=answer.verdict, timing=answer.timing)


class AcceptAll:
    """Keeps whatever was drafted: no expert is asked."""

    async def verify(
        self, session: Session, offer: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the whole block, kept."""
        del session, room, alone
        return VerifyResult(verdict=_kept(offer.block))


class VerifyOnDeferral:
    """Keeps what was drafted, and asks the expert for one token where the drafter defers."""

    def __init__(self, expert: Verifier) -> None:
        self._expert = expert

    async def verify(
        self, session: Session, offer: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the kept tokens, and the expert's next one after a deferral.

        Where nothing was drafted at all, the expert goes on alone.
        """
        kept = _kept(offer.block)
        if room <= kept.accepted or (kept.accepted and not offer.deferred):
            return VerifyResult(verdict=replace(kept, judged=kept.accepted))
        ahead = advance(session, kept, limit=session.position + room)
        alone = 1 if offer.deferred else alone
        judged = await self._expert.verify(ahead, NO_DRAFT, room=room - kept.accepted, alone=alone)
        verdict = Verdict(
            accepted=kept.accepted,
            tokens=kept.tokens + judged.verdict.tokens,
            origins=kept.origins + judged.verdict.origins,
            judged=kept.accepted + offer.deferred,
            deferred=int(offer.deferred),
            logprobs=kept.logprobs + judged.verdict.logprobs,
        )
        return VerifyResult(verdict=verdict, timing=judged.timing)


def _kept(block: Block) -> Verdict:
    return Verdict(
        accepted=block.length,
        tokens=block.tokens,
        origins=(Origin.KEPT,) * block.length,
        logprobs=block.logprobs,
    )
