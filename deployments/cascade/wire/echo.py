"""A tier without a model: answers every item at once, and remembers what it saw.

Tests and measurements of the wire serve it in place of a drafter or an expert.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cascade.decoding.session import Block, Origin, TokenLogprob, Verdict
from cascade.wire.frames import Close, Judge, Judgement, Open, Proposal, Propose, Score, Scores
from cascade.wire.tiers import Description

if TYPE_CHECKING:
    from cascade.wire.codec import Answer, Question
    from cascade.wire.server import Connection

DESCRIPTION = Description(
    model="echo",
    vocab_size=2**31 - 1,
    context_length=2**31 - 1,
    tokenizer_fingerprint="none",
    draft_limit=2**31 - 1,
)


class EchoTier:
    """Drafts token 0 as often as asked, accepts every block whole, scores every token 0 nats."""

    def __init__(self, description: Description = DESCRIPTION) -> None:
        self.description = description
        self.received: asyncio.Queue[tuple[Connection, Question]] = asyncio.Queue()
        self.ended: asyncio.Queue[Connection] = asyncio.Queue()

    def receive(self, connection: Connection, item: Question) -> None:
        """Answer the item and note it in `received`."""
        self.received.put_nowait((connection, item))
        answer = echo(item)
        if answer is not None:
            connection.send(answer)

    def disconnected(self, connection: Connection) -> None:
        """Note the end of the stream in `ended`."""
        self.ended.put_nowait(connection)

    def describe(self) -> Description:
        """Return what the tier was made with."""
        return self.description

    @property
    def alive(self) -> bool:
        """Always."""
        return True


def echo(item: Question) -> Answer | None:
    """Return the answer to an item; `Open` and `Close` have none."""
    match item:
        case Propose(session_id=session_id, epoch=epoch, position=position, count=count):
            return Proposal(
                session_id=session_id,
                epoch=epoch,
                position=position,
                digest=item.digest,
                block=Block(tokens=(0,) * count),
            )
        case Judge(session_id=session_id, epoch=epoch, position=position, block=block):
            verdict = Verdict(
                accepted=block.length, tokens=block.tokens, origins=(Origin.DRAFTER,) * block.length
            )
            return Judgement(
                session_id=session_id,
                epoch=epoch,
                position=position,
                digest=item.digest,
                verdict=verdict,
            )
        case Score(session_id=session_id, epoch=epoch, tokens=tokens):
            logprobs = tuple(TokenLogprob(token=token, logprob=0.0) for token in tokens[1:])
            return Scores(session_id=session_id, epoch=epoch, logprobs=logprobs)
        case Open() | Close():
            return None
