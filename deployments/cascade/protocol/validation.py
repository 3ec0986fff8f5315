"""What a replica allows of an item: ids inside the vocabulary, blocks no longer than agreed."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from cascade.errors import InvalidRequest
from cascade.protocol.messages import Close, Judge, Open, Propose, Score

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cascade.protocol.codec import ClientMessage
    from cascade.protocol.services import Description
    from cascade.types import Block, SparseProbs


def check(item: ClientMessage, allowed: Description) -> None:
    """Raise InvalidRequest if the model cannot read the item."""
    match item:
        case Open(session=session):
            biases = (token for token, _ in session.policy.sampling.logit_bias)
            _check_ids(chain(session.prompt, session.tokens, biases), allowed)
        case Judge(block=block):
            _check_ids(chain(item.tokens, block.tokens), allowed)
            _check_block(block, allowed)
        case Propose() | Score():
            _check_ids(item.tokens, allowed)
        case Close():
            pass


def _check_ids(tokens: Iterable[int], allowed: Description) -> None:
    largest = max(tokens, default=0)
    if largest >= allowed.vocab_size:
        raise InvalidRequest(
            f"token id {largest} is not in the vocabulary; ids are 0 to {allowed.vocab_size - 1}"
        )


def _check_block(block: Block, allowed: Description) -> None:
    if block.length > allowed.draft_limit:
        raise InvalidRequest(
            f"the block has {block.length} tokens; this replica judges up to {allowed.draft_limit}"
        )
    _check_ids((gates.argmax for gates in block.draft_stats), allowed)
    for row in block.draft_probs:
        _check_row(row, allowed)


def _check_row(row: SparseProbs, allowed: Description) -> None:
    if row.weights.size > allowed.vocab_size:
        raise InvalidRequest(
            f"a row has {row.weights.size} weights; the vocabulary has {allowed.vocab_size} tokens"
        )
    if row.ids.size:
        _check_ids((int(row.ids.max()),), allowed)
