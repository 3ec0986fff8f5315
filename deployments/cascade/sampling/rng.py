"""Coins from a counter: the same (seed, position, purpose) gives the same coin in every process.

The generator is Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 11).
The seed is its key; its counter holds the token's block of four, the position, the start of the
drafted block and the purpose.

With token by token verification a coin belongs to a position alone. What is emitted at a position
depends on the coins of that position and of earlier ones only, so a later round may toss the coins
of a dropped position again. Block verification is different: whether a prefix stands depends on the
tokens drafted after it, so by the time they are dropped their coins are known to be unlucky.
Tossing them again in the next round would draw from a conditioned law. There a coin belongs to the
pair (position, start of the block), and no two blocks share one.

Shapes: `N` coins or rows, `K` chosen tokens, `V` vocabulary.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

Words = TypeVar("Words", Tensor, NDArray[np.int64], int)

_MASK = 0xFFFFFFFF

_ROUNDS = 10

# Rows of this many counters together fit a core's cache.
_CHUNK = 1 << 16

_FEW = 6  # coins


class Purpose(IntEnum):
    """What a coin decides."""

    DRAFT = 1  # which token the drafter writes
    ACCEPT = 2  # whether it stands
    EMIT = 3  # which token the expert writes
    NOISE = 4  # the Gumbel noise of a position


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Return the four 32-bit words of each counter under each key, broadcast against each other.

    All words are int64 and hold 0 .. 2**32 - 1; products wrap modulo 2**64, which keeps their bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniforms(
    seeds_N: Sequence[int],
    positions_N: Sequence[int],
    purpose: Purpose,
    *more: Purpose,
    starts_N: Sequence[int] | None = None,
) -> Tensor:
    """Return one coin in [0, 1) for each seed and position, float64 [N] on the CPU.

    Args:
        seeds_N: Seeds of the sessions, 0 .. 2**63 - 1.
        positions_N: Committed tokens before the token that the coin decides.
        purpose: What the coin decides.
        more: What else is decided there; the coins are [1 + len(more), N] then.
        starts_N: Position at which the drafted block began; only for block verification.
    """
    starts_N = [-1] * len(seeds_N) if starts_N is None else starts_N
    purposes = (purpose, *more)
    shape = (len(purposes), len(seeds_N)) if more else (len(seeds_N),)
    if len(purposes) * len(seeds_N) <= _FEW:
        counters = list(zip(seeds_N, positions_N, starts_N, strict=True))
        coins = [_coin(*counter, purpose=one) for one in purposes for counter in counters]
        return torch.tensor(coins, dtype=torch.float64).view(shape)
    seed_N = np.asarray(seeds_N, dtype=np.int64)
    counter = (
        np.zeros(1, dtype=np.int64),
        np.asarray(positions_N, dtype=np.int64),
        np.asarray(starts_N, np.int64) + 1,
        np.array([[one] for one in purposes], np.int64),
    )
    high_PN, low_PN, _, _ = philox(counter, (seed_N & _MASK, seed_N >> 32))
    return torch.from_numpy(((high_PN >> 5) * 67108864.0 + (low_PN >> 6)) * 2.0**-53).view(shape)


def _coin(seed: int, position: int, start: int, *, purpose: Purpose) -> float:
    """Return one coin; a few are tossed sooner in plain Python than in arrays."""
    counter = (0, position, start + 1, int(purpose))
    high, low, _, _ = philox(counter, (seed & _MASK, seed >> 32))
    return ((high >> 5) * 67108864.0 + (low >> 6)) * 2.0**-53


def noise(
    seeds_N: Sequence[int], positions_N: Sequence[int], vocab: int, device: torch.device | str
) -> Tensor:
    """Return standard Gumbel noise for every token, float32 [N, V] on the device.

    It is computed in float64 and rounded, so that devices whose logarithms differ in the last bit
    still agree.
    """
    quads_Q = torch.arange((vocab + 3) // 4, device=device)
    rows = max(1, _CHUNK // len(quads_Q))
    chunks = [
        _gumbel(_words(seeds_N[i : i + rows], positions_N[i : i + rows], quads_Q[None, :]))
        for i in range(0, len(seeds_N), rows)
    ]
    if not chunks:
        return torch.empty(0, vocab, device=device)
    return torch.cat(chunks).flatten(1)[:, :vocab]


def noise_at(seeds_N: Sequence[int], positions_N: Sequence[int], ids_NK: Tensor) -> Tensor:
    """Return the Gumbel noise of chosen tokens: `noise(...)` gathered at `ids_NK`."""
    words_NK4 = _words(seeds_N, positions_N, ids_NK >> 2)
    return _gumbel(words_NK4.gather(-1, (ids_NK & 3)[..., None]).squeeze(-1))


def _words(seeds_N: Sequence[int], positions_N: Sequence[int], quads_NQ: Tensor) -> Tensor:
    """Return the words of the noise of four neighbouring tokens, int64 [N, Q, 4]."""
    device = quads_NQ.device
    seed_N1 = torch.tensor(seeds_N, dtype=torch.int64, device=device)[:, None]
    position_N1 = torch.tensor(positions_N, dtype=torch.int64, device=device)[:, None]
    zero_N1 = torch.zeros_like(seed_N1)
    counter = (quads_NQ, position_N1, zero_N1, zero_N1 + int(Purpose.NOISE))
    return torch.stack(philox(counter, (seed_N1 & _MASK, seed_N1 >> 32)), dim=-1)


def _gumbel(words: Tensor) -> Tensor:
    """Return Gumbel noise for 32-bit words; half a step keeps both logarithms finite."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()
