"""Which tokens may follow a text: bitmasks that both tiers apply to their raw logits.

A mask comes before bias, penalties, temperature and truncation, so a rule reads the distributions
of both models masked and renormalised. Reported log-probabilities are those of the raw logits.

A bitmask has one bit per token, set where the token may follow: 32 tokens a word, lowest bit first,
as xgrammar has it.

Shapes: `N` rows of logits, `R` rows of one block, `E` masked rows, `W` words of a bitmask,
`V` vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.sampling.phases import ThinkingBudget
from cascade.sampling.tensor_ops import upload

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from cascade.types import DecodingParams

Bits: TypeAlias = NDArray[np.uint32]

_WORD = 32
_FEW = 64  # rows where at most one token in so many may follow are written anew
_CHUNK_SIZE = 2**18  # logits that stay in a core's cache


class TokenMask(Protocol):
    """Which tokens may follow the answer of one session; drafter and expert have one each.

    It is asked on the engine's thread, for any text: a mask that follows a grammar goes back where
    the tokens differ from those it saw last.
    """

    def restrict(self, bits_RW: Bits, answer: Sequence[int], drafted: Sequence[int]) -> bool:
        """Clear the bits of tokens that may not follow; return whether any row is restricted.

        Args:
            bits_RW: Row i is that of the token after `answer` and `drafted[:i]`.
            answer: Tokens of the answer so far.
            drafted: Tokens after them, at least R - 1.
        """
        ...


class ConstraintMask:
    """The mask of a session's `TokenConstraints`."""

    def __init__(self, policy: DecodingParams, vocabulary: int) -> None:
        constraints = policy.constraints
        self._min_tokens = constraints.min_tokens
        self._stop_W = ~bits_of(policy.stop_ids, vocabulary)
        self._always_W: Bits | None = None
        if constraints.allowed_ids:
            self._always_W = bits_of(constraints.allowed_ids, vocabulary)
        single = [word[0] for word in constraints.bad_words if len(word) == 1]
        if single:
            always_W = _every_bit(vocabulary) if self._always_W is None else self._always_W
            self._always_W = always_W & ~bits_of(single, vocabulary)
        # By their last but one token: the tokens before that one, and the last one.
        self._words: defaultdict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        for word in constraints.bad_words:
            if len(word) > 1 and word[-1] < vocabulary:
                self._words[word[-2]].append((word[:-2], word[-1]))
        self._longest = max(map(len, constraints.bad_words), default=0)

    def restrict(self, bits_RW: Bits, answer: Sequence[int], drafted: Sequence[int]) -> bool:
        """Clear the bits of tokens that may not follow; return whether any row is restricted."""
        early = min(max(0, self._min_tokens - len(answer)), len(bits_RW))
        bits_RW[:early] &= self._stop_W
        restricted = early > 0
        if self._always_W is not None:
            bits_RW &= self._always_W
            restricted = True
        if not self._words:
            return restricted
        known = max(0, len(answer) - self._longest)
        text = [*answer[known:], *drafted[: len(bits_RW) - 1]]
        for row, bits_W in enumerate(bits_RW):
            end = len(answer) - known + row
            for before, last in self._words.get(text[end - 1], ()) if end else ():
                start = end - 1 - len(before)
                if start >= 0 and tuple(text[start : end - 1]) == before:
                    bits_W[last // _WORD] &= ~np.uint32(1 << last % _WORD)
                    restricted = True
        return restricted


def constraint_masks(policy: DecodingParams, vocabulary: int) -> tuple[TokenMask, ...]:
    """Return the masks that decoding parameters imply for a session.

    Args:
        policy: The session's parameters.
        vocabulary: Logits of a row.
    """
    constraints, masks = policy.constraints, list[TokenMask]()
    if constraints.min_tokens or constraints.bad_words or constraints.allowed_ids:
        masks.append(ConstraintMask(policy, vocabulary))
    if policy.phases is not None and policy.phases.thinking_tokens is not None:
        masks.append(ThinkingBudget(policy.phases))
    return tuple(masks)


def allowed_bits(
    masks: Sequence[TokenMask],
    answer: Sequence[int],
    drafted: Sequence[int] = (),
    *,
    stop_ids: Collection[int],
    vocabulary: int,
) -> Bits | None:
    """Return which tokens may follow at each row of a block, [R, W], or None if all may.

    Where no token may, the answer ends: stop tokens may follow, and all tokens if there are none.

    Args:
        masks: The session's.
        answer: Tokens before the block.
        drafted: R - 1 tokens of it.
        stop_ids: What ends the answer.
        vocabulary: Logits of a row.
    """
    if not masks:
        return None
    bits_RW = np.tile(_every_bit(vocabulary), (len(drafted) + 1, 1))
    restricted = [mask.restrict(bits_RW, answer, drafted) for mask in masks]
    if not any(restricted):
        return None
    dead_R = ~bits_RW.any(axis=1)
    if dead_R.any():
        ends_W = bits_of(stop_ids, vocabulary)
        bits_RW[dead_R] = ends_W if ends_W.any() else _every_bit(vocabulary)
    return bits_RW


def only_tokens(bits_RW: Bits) -> list[int | None]:
    """Return the only token that may follow at each row, or None where several may."""
    single_R = np.bitwise_count(bits_RW).sum(axis=1) == 1
    return [
        int.from_bytes(bits_W.astype("<u4").tobytes(), "little").bit_length() - 1
        if single
        else None
        for bits_W, single in zip(bits_RW, single_R.tolist(), strict=True)
    ]


def allows(bits_RW: Bits, tokens: Sequence[int]) -> list[bool]:
    """Return whether each token may follow at its row."""
    return [
        bool(bits_W[token // _WORD] >> np.uint32(token % _WORD) & 1)
        for bits_W, token in zip(bits_RW, tokens, strict=False)
    ]


def apply_masks(logits_NV: Tensor, masked: Iterable[tuple[int, Bits | None]]) -> None:
    """Set logits to -inf where a token may not follow, in place.

    Where a model gives probability 0 to all tokens that may follow, they are equally likely.

    Args:
        logits_NV: Raw logits, any float type, none +inf or NaN.
        masked: The first row of each block, and which tokens may follow at its rows.
    """
    found = [(first, bits_RW) for first, bits_RW in masked if bits_RW is not None]
    if not found:
        return
    rows_E = np.concatenate([first + np.arange(len(bits_RW)) for first, bits_RW in found])
    bits_EW = np.concatenate([bits_RW for _, bits_RW in found])
    few_E = np.bitwise_count(bits_EW).sum(axis=1) <= logits_NV.shape[1] // _FEW
    if few_E.any():
        _keep_few(logits_NV, rows_E[few_E], bits_EW[few_E])
    rows_E, bits_EW = rows_E[~few_E], bits_EW[~few_E]
    on_cpu = logits_NV.device.type == "cpu"
    step = max(1, _CHUNK_SIZE // logits_NV.shape[1]) if on_cpu else len(rows_E) + 1
    for first in range(0, len(rows_E), step):
        rows = rows_E[first : first + step]
        if rows[-1] - rows[0] < len(rows):
            _mask_rows(logits_NV[rows[0] : rows[-1] + 1], bits_EW[first : first + step])
            continue
        index = upload(rows, logits_NV.device)
        some_EV = logits_NV[index]
        _mask_rows(some_EV, bits_EW[first : first + step])
        logits_NV.index_copy_(0, index, some_EV)


def _keep_few(logits_NV: Tensor, rows_E: NDArray[np.int64], bits_EW: Bits) -> None:
    """Mask rows where few tokens may follow: only their logits are read."""
    words = np.flatnonzero(bits_EW != 0)
    row, word = np.divmod(words, bits_EW.shape[1])
    octets = bits_EW.ravel()[words].astype("<u4", copy=False).view(np.uint8)
    at, bit = np.divmod(np.flatnonzero(np.unpackbits(octets, bitorder="little")), _WORD)
    device = logits_NV.device
    row_K, id_K = upload(row[at], device), upload(_WORD * word[at] + bit, device)
    index_E = upload(rows_E, device)
    kept_K = logits_NV[index_E[row_K], id_K]
    peak_E = torch.full((len(rows_E),), -math.inf, dtype=kept_K.dtype, device=device)
    peak_E.scatter_reduce_(0, row_K, kept_K, "amax")
    logits_NV.index_fill_(0, index_E, -math.inf)
    logits_NV[index_E[row_K], id_K] = torch.where(peak_E[row_K] == -math.inf, 0.0, kept_K)


def _mask_rows(logits_EV: Tensor, bits_EW: Bits) -> None:
    """Apply a bitmask to each row, in place."""
    octets = bits_EW.astype("<u4", copy=False).view(np.uint8)
    index = upload(torch.from_numpy(octets).flatten(), logits_EV.device).int()
    # Eight logits are looked up at a time: no pass over memory depends on how many tokens may
    # follow, as a loop over either kind would.
    table_O8 = _octet_logits(logits_EV.dtype).to(logits_EV.device)
    mask_EV = table_O8.index_select(0, index).view(len(octets), -1)[:, : logits_EV.shape[1]]
    logits_EV.add_(mask_EV)
    dead_E1 = logits_EV.amax(dim=1, keepdim=True) == -math.inf
    if logits_EV.device.type != "cpu" or dead_E1.any():
        logits_EV.copy_(torch.where(dead_E1, mask_EV, logits_EV))


@lru_cache
def _octet_logits(dtype: torch.dtype) -> Tensor:
    """Return what each octet of a bitmask adds to eight logits, [256, 8]: 0 or -inf."""
    flags = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.where(torch.from_numpy(flags).bool(), 0.0, -math.inf).to(dtype)


@lru_cache
def _every_bit(vocabulary: int) -> Bits:
    """Return a bitmask with all tokens of the vocabulary, not to be changed."""
    bits_W = np.full(-(-vocabulary // _WORD), 2**_WORD - 1, np.uint32)
    if vocabulary % _WORD:
        bits_W[-1] = (1 << vocabulary % _WORD) - 1
    return bits_W


def bits_of(ids: Iterable[int], vocabulary: int) -> Bits:
    """Return a bitmask with these tokens; ids beyond the vocabulary are ignored."""
    flags = np.zeros(-(-vocabulary // _WORD) * _WORD, np.uint8)
    flags[[id_ for id_ in ids if id_ < vocabulary]] = 1
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32, copy=False)
