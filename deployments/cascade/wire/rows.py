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

    A row without any entry is `decoding.rows.ABSENT`: at its position the drafter alone decides.
    """
    ids = _ids(message.token_ids)
    weights = _weights(message.weights, "weights")
    if weights.size and not weights.any():
        raise InvalidRequest("a row has no positive weight; a law needs one")
    if ids.size not in (0, weights.size):
        raise InvalidRequest(f"a row has {ids.size} ids and {weights.size} weights")
    if not message.HasField("unscaled_weights"):
        return Row(ids=ids, weights=weights)
    unscaled = _weights(message.unscaled_weights, "unscaled_weights")
    if unscaled.size != weights.size:
        raise InvalidRequest(f"a row has {weights.size} weights and {unscaled.size} unscaled ones")
    return Row(ids=ids, weights=weights, unscaled=unscaled)


def _ids(data: bytes) -> NDArray[np.uint32]:
    if len(data) % 4:
        raise InvalidRequest(f"`rows.token_ids` has {len(data)} bytes; an id has four")
    return np.frombuffer(data, dtype="<u4")


def _weights(data: bytes, name: str) -> NDArray[np.float16]:
    if len(data) % 2:
        raise InvalidRequest(f"`rows.{name}` has {len(data)} bytes; a float16 has two")
    bits = np.frombuffer(data, dtype="<u2")
    if bits.max(initial=0) >= _INFINITY_BITS:
        raise InvalidRequest(f"`rows.{name}` has a weight that is negative, infinite or no number")
    return bits.view("<f2")
