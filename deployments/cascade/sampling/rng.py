"""Counter-based random numbers: one (seed, position, purpose) is one number in every process.

The generator is Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 11).
The key is the seed; the counter holds the token id divided by four (of noise), the position, the
start of the drafted block and the purpose.

In token verification a number belongs to a position alone. The token emitted at a position depends
on the numbers of that position and of earlier ones only, so a later round may use the numbers of a
dropped position again. In block verification, whether a prefix is accepted depends on the tokens
drafted after it. When those are dropped, their numbers are known to be unfavourable, and a second
use would sample from a conditional distribution. So there a number belongs to the pair (position,
start of the block), and no two blocks share one.

Shapes: `N` numbers or rows, `K` chosen tokens, `P` purposes, `V` vocabulary.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.sampling.tensor_ops import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

Words = TypeVar("Words", Tensor, NDArray[np.int64], int)

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_CHUNK_SIZE = 1 << 16  # counters whose intermediate values fit a core's cache
_FEW = 6  # numbers up to which plain Python is faster than arrays


class Purpose(IntEnum):
    """What a random number decides."""

    DRAFT = 1  # the drafted token
    ACCEPT = 2  # whether it is accepted
    NEXT_TOKEN = 3  # the recovered or bonus token
    NOISE = 4  # the Gumbel noise of a position


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Return the four 32-bit words of each counter and key, which are broadcast together.

    All words are int64 and hold 0 .. 2**32 - 1. Products wrap modulo 2**64, which keeps their bits.
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
    *purposes: Purpose,
    block_starts_N: Sequence[int] | None = None,
) -> Tensor:
    """Return uniform numbers in [0, 1), float64 on the CPU: [N], or [P, N] for several purposes.

    Args:
        seeds_N: Seeds of the sessions, 0 .. 2**63 - 1.
        positions_N: Committed tokens before the token that the number decides about.
        purposes: What the numbers decide, one or more.
        block_starts_N: Position at which the drafted block began; only for block verification.
    """
    starts_N = [-1] * len(seeds_N) if block_starts_N is None else block_starts_N
    shape = (len(purposes), len(seeds_N)) if len(purposes) > 1 else (len(seeds_N),)
    if len(purposes) * len(seeds_N) <= _FEW:
        counters = list(zip(seeds_N, positions_N, starts_N, strict=True))
        words = [
            philox((0, position, start + 1, int(purpose)), (seed & _MASK, seed >> 32))
            for purpose in purposes
            for seed, position, start in counters
        ]
        numbers = [_unit(high, low) for high, low, _, _ in words]
        return torch.tensor(numbers, dtype=torch.float64).view(shape)
    seed_N = np.asarray(seeds_N, dtype=np.int64)
    counter = (
        np.zeros(1, dtype=np.int64),
        np.asarray(positions_N, dtype=np.int64),
        np.asarray(starts_N, np.int64) + 1,
        np.array([[purpose] for purpose in purposes], np.int64),
    )
    high_PN, low_PN, _, _ = philox(counter, (seed_N & _MASK, seed_N >> 32))
    return torch.from_numpy(_unit(high_PN, low_PN)).view(shape)


def _unit(high: Any, low: Any) -> Any:
    """Return the 53-bit fraction that two words make."""
    return ((high >> 5) * 67108864.0 + (low >> 6)) * 2.0**-53


def gumbel_noise(
    seeds_N: Sequence[int], positions_N: Sequence[int], vocab: int, device: torch.device | str
) -> Tensor:
    """Return standard Gumbel noise for every token, float32 [N, V].

    It is computed in float64 and rounded, so that devices whose logarithms differ in the last bit
    still agree.

    Args:
        seeds_N: Seeds of the sessions.
        positions_N: Committed tokens before the token that the noise chooses.
        vocab: Number of tokens V.
        device: Where to compute it.
    """
    quads_Q = torch.arange((vocab + 3) // 4, device=device)
    rows = max(1, _CHUNK_SIZE // len(quads_Q))
    chunks = [
        _gumbel(_noise_words(seeds_N[i : i + rows], positions_N[i : i + rows], quads_Q[None, :]))
        for i in range(0, len(seeds_N), rows)
    ]
    if not chunks:
        return torch.empty(0, vocab, device=device)
    return torch.cat(chunks).flatten(1)[:, :vocab]


def gumbel_noise_at(seeds_N: Sequence[int], positions_N: Sequence[int], ids_NK: Tensor) -> Tensor:
    """Return the Gumbel noise of chosen tokens `ids_NK`, float32 [N, K]; see `gumbel_noise`."""
    words_NK4 = _noise_words(seeds_N, positions_N, ids_NK >> 2)
    return _gumbel(words_NK4.gather(-1, (ids_NK & 3)[..., None]).squeeze(-1))


def _noise_words(seeds_N: Sequence[int], positions_N: Sequence[int], quads_NQ: Tensor) -> Tensor:
    """Return the words of groups of four neighbouring tokens, int64 [N, Q, 4]."""
    device = quads_NQ.device
    seed_N1 = upload(seeds_N, device, dtype=torch.int64)[:, None]
    position_N1 = upload(positions_N, device, dtype=torch.int64)[:, None]
    zero_N1 = torch.zeros_like(seed_N1)
    counter = (quads_NQ, position_N1, zero_N1, zero_N1 + int(Purpose.NOISE))
    return torch.stack(philox(counter, (seed_N1 & _MASK, seed_N1 >> 32)), dim=-1)


def _gumbel(words: Tensor) -> Tensor:
    """Return Gumbel noise made of 32-bit words; half a step keeps both logarithms finite."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()
