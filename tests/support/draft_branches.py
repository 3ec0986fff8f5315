"""Draft branches and drafted tokens without an engine."""

from __future__ import annotations

from typing import Any, cast

from tests.support.fake_engine import GREEDY

from cascade.drafter.draft_branch import DraftBranch, PendingBlock
from cascade.drafter.draft_tree import DraftSession
from cascade.engine.request import NOBODYS
from cascade.protocol.messages import Propose, extend_digest
from cascade.speculation.confidence import Calibration, TokenConfidence
from cascade.speculation.draft import DraftToken
from cascade.types import DecodingParams, Session, SessionId

PROMPT = (1, 2)


def drafted(token: int, prob: float | None = None, *, runner_up: int = 0) -> DraftToken:
    """Return a drafted token; with a confidence if `prob` is given."""
    confidence = None
    if prob is not None:
        confidence = TokenConfidence(probability=prob, runner_up=runner_up, runner_up_share=0.5)
    return DraftToken(token=token, confidence=confidence)


def digest(*tokens: int) -> int:
    """Return the digest of the prompt and tokens after it."""
    return extend_digest(extend_digest(0, PROMPT), tokens)


def propose(*tokens: int, count: int = 2, **more: Any) -> Propose:
    """Return a message that requests a block after these tokens."""
    return Propose(
        session_id=SessionId("s"),
        epoch=1,
        position=len(tokens),
        digest=digest(*tokens),
        count=count,
        **more,
    )


def new_session(*tokens: int, policy: DecodingParams = GREEDY) -> DraftSession:
    """Return a session that has committed these tokens."""
    return DraftSession(
        connection=cast("Any", None),
        opened=Session(id=SessionId("s"), prompt=PROMPT, policy=policy),
        epoch=1,
        lease="",
        share=NOBODYS,
        engine_id=SessionId("s/0"),
        tokens=list(tokens),
    )


def new_branch(
    *tokens: int,
    message: Propose | None = None,
    policy: DecodingParams = GREEDY,
    limit: int = 64,
    calibration: Calibration | None = None,
) -> DraftBranch:
    """Return a main branch that is about to draft its first token after these.

    Args:
        tokens: Committed ones.
        message: What is requested; by default two tokens.
        policy: Of the session.
        limit: The context length.
        calibration: Of acceptance; a new one if absent.
    """
    message = message or propose(*tokens)
    session = new_session(*tokens, policy=policy)
    session.engine_tokens = list(tokens)
    return DraftBranch(
        session=session,
        message=message,
        tokens=session.engine_tokens,
        limit=limit,
        calibration=calibration or Calibration(),
        block=PendingBlock(position=message.position, digest=message.digest, count=message.count),
    )
