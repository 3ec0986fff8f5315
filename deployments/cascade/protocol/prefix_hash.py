"""A 64-bit digest of a token sequence, one link of a chain per token.

Two peers that hold the same digest at the same position hold, but for a chance of 2**-64, the same
tokens. It guards against confusion, not against malice: the lease does that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from collections.abc import Iterable


def extend(digest: int, tokens: Iterable[int]) -> int:
    """Return the digest of the sequence behind `digest` followed by `tokens`; 0 is the empty one.

    However the tokens are cut into batches, the result is the same:
    `extend(extend(0, (1, 2)), (3,)) == extend(0, (1, 2, 3))`.
    """
    for token in tokens:
        digest = xxh3_64_intdigest(token.to_bytes(4, "little"), digest)
    return digest
