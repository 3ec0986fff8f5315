from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascade.errors import InvalidRequest
from cascade.protocol.messages import Close, Judge, Open, Propose, Score
from cascade.protocol.server import check_limits
from cascade.protocol.services import Description
from cascade.types import (
    Block,
    DecodingParams,
    DraftStats,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
)

if TYPE_CHECKING:
    from cascade.protocol.codec import ClientMessage

LIMITS = Description(
    model="m", vocab_size=10, context_length=100, tokenizer_fingerprint="f", draft_limit=2
)

ID = SessionId("s")

FULL, HALF = np.ones(10, np.float16), np.ones(1, np.float16)


def opened(
    *,
    prompt: tuple[int, ...] = (9,),
    tokens: tuple[int, ...] = (),
    source: tuple[int, ...] = (),
    bias: tuple[tuple[int, float], ...] = (),
) -> Open:
    policy = DecodingParams(sampling=SamplingParams(logit_bias=bias))
    session = Session(id=ID, prompt=prompt, tokens=tokens, policy=policy, source=source)
    return Open(session=session, epoch=1, lease="")


def judge(block: Block, *, tokens: tuple[int, ...] = ()) -> Judge:
    return Judge(session_id=ID, epoch=1, position=1, digest=0, block=block, tokens=tokens)


def propose(*tokens: int) -> Propose:
    return Propose(session_id=ID, epoch=1, position=1, digest=0, count=1, tokens=tokens)


def sparse(token: int) -> SparseProbs:
    return SparseProbs(ids=np.array([token], np.uint32), weights=HALF)


@pytest.mark.parametrize(
    "message",
    [
        opened(prompt=(0, 9), tokens=(9,), source=(9,), bias=((9, 1.0),)),
        propose(9),
        judge(
            Block(
                tokens=(9, 9),
                draft_probs=(sparse(9), SparseProbs(ids=np.empty(0, np.uint32), weights=FULL)),
            )
        ),
        Score(session_id=ID, epoch=1, lease="", tokens=(9,), top=1),
        Close(session_id=ID, epoch=1),
    ],
)
def test_the_last_id_of_the_vocabulary_is_allowed(message: ClientMessage) -> None:
    check_limits(message, LIMITS)


@pytest.mark.parametrize(
    "message",
    [
        opened(prompt=(0, 10)),
        opened(tokens=(10,)),
        opened(source=(10,)),
        opened(bias=((10, 1.0),)),
        propose(10),
        judge(Block(), tokens=(10,)),
        judge(Block(tokens=(10,))),
        judge(Block(tokens=(1,), draft_probs=(sparse(10),))),
        judge(Block(tokens=(1,), draft_stats=(DraftStats(max_prob=1, argmax=10, entropy=0),))),
        Score(session_id=ID, epoch=1, lease="", tokens=(1, 10), top=1),
    ],
)
def test_an_id_outside_the_vocabulary_is_refused(message: ClientMessage) -> None:
    with pytest.raises(
        InvalidRequest, match="token id 10 is not in the vocabulary; ids are 0 to 9"
    ):
        check_limits(message, LIMITS)


def test_a_block_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the block has 3 tokens; this replica judges up to 2"):
        check_limits(judge(Block(tokens=(1, 2, 3))), LIMITS)


def test_a_distribution_wider_than_the_vocabulary_is_refused() -> None:
    wide = SparseProbs(ids=np.empty(0, np.uint32), weights=np.ones(11, np.float16))
    with pytest.raises(InvalidRequest, match="a row has 11 weights; the vocabulary has 10 tokens"):
        check_limits(judge(Block(tokens=(1,), draft_probs=(wide,))), LIMITS)
