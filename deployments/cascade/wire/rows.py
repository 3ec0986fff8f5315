"""Rows of a drafter's law as bytes: ids in four each, weights in two, little-endian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascade.decoding.session import Row
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascade.v1 import tokens_pb2

# The bits of a float16 that is finite and not negative are below those of infinity.
_INFINITY_BITS = 0x7C00


def encode_row(row: Row, to: tokens_pb2.Row) -> None:
    """Write the row into the message."""
    to.token_ids = row.ids.astype("<u4", copy=False).tobytes()
    to.weights = row.weights.astype("<f2", copy=False).tobytes()
    if row.unscaled is not None:
        to.unscaled_weights = row.unscaled.astype("<f2", copy=False).tobytes()


def decode_row(message: tokens_pb2.Row) -> Row:
    """Return the row, its arrays read-only; raises InvalidRequest if it is no law.

    A row without entries says that the position ships none.
    """
    row = Row(
        ids=_ids(message.token_ids),
        weights=_weights(message.weights, "weights"),
        unscaled=_weights(message.unscaled_weights, "unscaled_weights")
        if message.HasField("unscaled_weights")
        else None,
    )
    _check(row)
    return row


def _ids(data: bytes) -> NDArray[np.uint32]:
    if len(data) % 4:
        raise InvalidRequest(f"`rows.token_ids` has {len(data)} bytes; an id has four")
    return np.frombuffer(data, dtype="<u4")


def _weights(data: bytes, name: str) -> NDArray[np.float16]:
    if len(data) % 2:
        raise InvalidRequest(f"`rows.{name}` has {len(data)} bytes; a float16 has two")
    bits = np.frombuffer(data, dtype="<u2")
    if bits.size and bits.max() >= _INFINITY_BITS:
        raise InvalidRequest(f"`rows.{name}` has a weight that is negative, infinite or no number")
    return bits.view("<f2")


def _check(row: Row) -> None:
    if row.ids.size and row.ids.size != row.weights.size:
        raise InvalidRequest(f"a row has {row.ids.size} ids and {row.weights.size} weights")
    if row.unscaled is not None and row.unscaled.size != row.weights.size:
        raise InvalidRequest(
            f"a row has {row.weights.size} weights and {row.unscaled.size} unscaled ones"
        )
    if row.weights.size and not row.weights.any():
        raise InvalidRequest("a row has no positive weight; a law needs one")
