"""When a draft had better stop: what the drafter's own probabilities say of its tokens' chances.

Stopping changes no law, because the token at a place is never dropped once it is drawn. Whether a
block goes on after x_1 .. x_j is decided from those tokens, their rows, and verdicts on earlier
positions: from the past of place j + 1, none of whose coins was looked at. So, given that past,
either x_j+1 is drawn from q and judged, and what is committed there follows pi (Alg. 4), or the
block ends and the bonus follows, as after any block of j tokens. Each holds for every past by
itself, hence for any way to choose between them. For block verification the induction of arXiv
2403.10444 runs over prefixes, from the longest: P(i or more stand | x_1 .. x_i) = p_i holds where a
block ends, and where it goes on if it holds one token later; no step asks that all blocks end at
one length. To drop a token for its own low probability would be wrong: what is left would be drawn
from q given that it is likely.

The same probabilities say which verdicts are likely, and so what else to draft in advance.

Shapes: `B` sessions, `K` tokens with scores, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cascade.sampling.tensor_ops import to_list, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

BINS = 10

MEMORY = 300.0  # tokens of a bin after which the first counts a third

PRIOR_TOKENS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfidence:
    """What a row says of the token that was chosen from it."""

    confidence: float  # its probability at temperature 1, without truncation
    rival: int  # the likeliest other token
    share: float  # of the rival, in what the others have


def outlooks(
    logits_BV: Tensor,
    tokens_B: Sequence[int],
    *,
    scores_BK: Tensor | None = None,
    ids_BK: Tensor | None = None,
) -> list[TokenConfidence]:
    """Return what each row says of its token.

    Args:
        logits_BV: The drafter's raw logits.
        tokens_B: What was chosen.
        scores_BK: What the rival is read from, like logits: under the gumbel coupling the perturbed
            row, whose second place is what the expert is likely to choose. The logits if absent.
        ids_BK: The tokens that the scores belong to; all if absent.
    """
    if logits_BV.device.type == "cpu" and scores_BK is None:
        return _on_host(widen(logits_BV).numpy(), tokens_B)
    chosen_B1 = torch.tensor(tokens_B, device=logits_BV.device)[:, None]
    weights_BV = logits_BV.softmax(dim=1, dtype=torch.float32)
    chance_B1 = weights_BV.gather(1, chosen_B1)
    weights_BK = weights_BV if scores_BK is None else scores_BK.softmax(dim=1, dtype=torch.float32)
    others_BK = _without(weights_BK, ids_BK, chosen_B1)
    best_B1, place_B1 = others_BK.max(dim=1, keepdim=True)
    rival_B1 = place_B1 if ids_BK is None else ids_BK.gather(1, place_B1)
    share_B1 = (best_B1 / others_BK.sum(dim=1, keepdim=True)).nan_to_num()
    found_B3 = torch.cat([chance_B1, rival_B1, share_B1], dim=1)
    return [
        TokenConfidence(confidence=confidence, rival=int(rival), share=share)
        for confidence, rival, share in to_list(found_B3)
    ]


def _on_host(rows_BV: NDArray[np.floating[Any]], tokens_B: Sequence[int]) -> list[TokenConfidence]:
    """Return what rows of the host say: numpy takes a fraction of the time that torch does."""
    weights_BV = np.exp(rows_BV - rows_BV.max(axis=1, keepdims=True))
    row_B, chosen_B = np.arange(len(tokens_B)), np.asarray(tokens_B)
    chance_B = weights_BV[row_B, chosen_B] / weights_BV.sum(axis=1)
    weights_BV[row_B, chosen_B] = 0
    rival_B = weights_BV.argmax(axis=1)
    rest_B = weights_BV.sum(axis=1)
    share_B = weights_BV[row_B, rival_B] / np.where(rest_B > 0, rest_B, 1)
    found = zip(chance_B.tolist(), rival_B.tolist(), share_B.tolist(), strict=True)
    return [
        TokenConfidence(confidence=chance, rival=rival, share=share)
        for chance, rival, share in found
    ]


def _without(weights_BK: Tensor, ids_BK: Tensor | None, chosen_B1: Tensor) -> Tensor:
    """Return the weights, 0 for the chosen token."""
    if ids_BK is None:
        return weights_BK.scatter(1, chosen_B1, 0.0)
    return weights_BK.masked_fill(ids_BK == chosen_B1, 0.0)


@dataclass(slots=True, kw_only=True)
class Calibration:
    """How often tokens of a confidence stood; before any was judged, as often as it says."""

    _stood: list[float] = field(default_factory=lambda: [0.0] * BINS)
    _judged: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def chance(self, confidence: float) -> float:
        """Return the chance that a token of this confidence stands."""
        place = _bin(confidence)
        prior = PRIOR_TOKENS * confidence
        return (self._stood[place] + prior) / (self._judged[place] + PRIOR_TOKENS)

    def learn(self, confidence: float, *, stood: bool) -> None:
        """Take in what became of a token that was judged."""
        place, kept = _bin(confidence), 1 - 1 / MEMORY
        self._stood[place] = kept * self._stood[place] + stood
        self._judged[place] = kept * self._judged[place] + 1


def _bin(confidence: float) -> int:
    return min(BINS - 1, int(BINS * confidence))
