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

Shapes: `B` sessions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BINS = 10
MEMORY = 300.0  # tokens of a bin after which the first counts a third
PRIOR_TOKENS = 4.0


def confidences(logits_BV: Tensor, tokens_B: Sequence[int]) -> list[float]:
    """Return the probability of each row's token at temperature 1, without truncation."""
    chosen_B1 = torch.tensor(tokens_B, device=logits_BV.device)[:, None]
    rows_BV = logits_BV.float()
    log_B = rows_BV.gather(1, chosen_B1).squeeze(1) - rows_BV.logsumexp(dim=1)
    return log_B.exp().tolist()


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
