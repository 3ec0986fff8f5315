"""Who decides on a draft: the expert, the expert at deferrals only, or nobody.

`speculation.modes` says which mode uses which.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cascade.errors import ExpertUnavailable
from cascade.protocol.messages import Judge, Judgement
from cascade.router.drafters import NO_DRAFT
from cascade.speculation.cost_model import Timing
from cascade.types import Block, Origin, Session, Verdict, advance

if TYPE_CHECKING:
    from cascade.router.drafters import Draft
    from cascade.router.tier_session import TierSession


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """A verdict and what it took."""

    verdict: Verdict
    timing: Timing = field(default_factory=Timing)


class Verifier(Protocol):
    """Verifies blocks."""

    async def verify(
        self, session: Session, draft: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the verdict on a draft.

        Args:
            session: What the draft follows.
            draft: If empty, the expert writes by itself.
            room: Tokens that the answer may still have; the verdict is cut there.
            alone: Tokens that the expert writes in a row after an empty draft.
        """
        ...


class RemoteVerifier:
    """Verifies on a replica of the expert tier.

    After an empty draft the replica writes several tokens and pushes a verdict for each.
    """

    def __init__(self, tier_session: TierSession) -> None:
        self._tier_session = tier_session
        self._pushed = 0  # verdicts that the replica still sends without being asked
        self._next_position = 0  # of the first of them

    async def verify(
        self, session: Session, draft: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the replica's verdict.

        Raises:
            ExpertUnavailable: No replica is left.
        """
        block = draft.block
        pushed = self._pushed > 0 and session.position == self._next_position and not block.length
        if pushed:
            self._pushed -= 1
        else:
            self._pushed = 0 if block.length else max(0, min(alone, room) - 1)
        ahead = self._pushed

        def judge(epoch: int, digest: int, missing: tuple[int, ...]) -> Judge:
            return Judge(
                session_id=session.id,
                epoch=epoch,
                position=session.position,
                digest=digest,
                block=block,
                tokens=missing,
                ahead=ahead,
                divergence_left=session.divergence_left,
            )

        judgement = await self._tier_session.ask(session, judge, pushed=pushed)
        assert isinstance(judgement, Judgement), "an expert replies to Judge with Judgement"
        if session.divergence_left is not None and judgement.verdict.divergence_left is None:
            raise ExpertUnavailable(
                "the expert does not know divergence budgets; deploy it from the router's release"
            )
        committed = len(judgement.verdict.tokens)
        self._tier_session.record_verdict(committed)
        self._next_position = judgement.position + committed
        return VerifyResult(verdict=judgement.verdict, timing=judgement.timing)


class AcceptAll:
    """Accepts every draft; the expert never runs."""

    async def verify(
        self, session: Session, draft: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the whole block as kept."""
        del session, room, alone
        return VerifyResult(verdict=_keep(draft.block))


class VerifyOnDeferral:
    """Accepts every draft, and asks the expert for one token where the drafter defers."""

    def __init__(self, expert: Verifier) -> None:
        self._expert = expert

    async def verify(
        self, session: Session, draft: Draft, *, room: int, alone: int
    ) -> VerifyResult:
        """Return the kept tokens, and the expert's next token after a deferral.

        After an empty draft without a deferral the expert writes alone.
        """
        kept = _keep(draft.block)
        if room <= kept.accepted or (kept.accepted and not draft.deferred):
            return VerifyResult(verdict=replace(kept, judged=kept.accepted))
        after_block = advance(session, kept, limit=session.position + room)
        alone = 1 if draft.deferred else alone
        result = await self._expert.verify(
            after_block, NO_DRAFT, room=room - kept.accepted, alone=alone
        )
        verdict = Verdict(
            accepted=kept.accepted,
            tokens=kept.tokens + result.verdict.tokens,
            origins=kept.origins + result.verdict.origins,
            judged=kept.accepted + draft.deferred,
            deferred=int(draft.deferred),
            logprobs=kept.logprobs + result.verdict.logprobs,
            divergences=kept.divergences + result.verdict.divergences,
        )
        return VerifyResult(verdict=verdict, timing=result.timing)


def _keep(block: Block) -> Verdict:
    return Verdict(
        accepted=block.length,
        tokens=block.tokens,
        origins=tuple(
            Origin.FORCED if forced else Origin.KEPT
            for forced in block.forced or (False,) * block.length
        ),
        logprobs=tuple(replace(entry, drafter=True) for entry in block.logprobs),
        divergences=tuple(
            0.0 if forced else None for forced in block.forced or (False,) * block.length
        ),
    )
