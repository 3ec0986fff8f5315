"""When to stop drafting: what the drafter's probabilities say about its tokens' acceptance.

Stopping early changes no distribution, because a token is never dropped once it is sampled. Whether
a block continues after x_1 .. x_j is decided from those tokens, their probabilities and earlier
verdicts: from the past of position j + 1, whose random numbers are still unused. Given that past,
either x_j+1 is sampled from q and judged, and what is committed there follows pi (Alg. 4), or the
block ends and the bonus token follows, as after any block of j tokens. Each holds for every past by
itself, hence for any way to choose between them. For block verification the induction of arXiv
2403.10444 runs over prefixes, from the longest: P(i or more are accepted | x_1 .. x_i) = p_i holds
where a block ends, and where it continues if it holds one token later; no step requires that all
blocks have one length. To drop a token for its own low probability would be wrong: the tokens left
would be samples of q given that they are likely.

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
MEMORY = 300.0  # judged tokens of a bin after which an older one counts a third
PRIOR_TOKENS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfidence:
    """What the drafter's distribution says about the token chosen from it."""

    probability: float  # of the token at temperature 1, without truncation
    runner_up: int  # the likeliest other token
    runner_up_share: float  # of the probability of all other tokens


def token_confidences(
    logits_BV: Tensor,
    tokens_B: Sequence[int],
    *,
    scores_BK: Tensor | None = None,
    ids_BK: Tensor | None = None,
) -> list[TokenConfidence]:
    """Return what each row says about its token.

    Args:
        logits_BV: The drafter's raw logits.
        tokens_B: The tokens chosen.
        scores_BK: What the runner-up is read from, like logits: under the Gumbel coupling the
            perturbed row, whose second is what the expert is likely to choose. Default: the logits.
        ids_BK: The tokens of the scores; default: the vocabulary.
    """
    if logits_BV.device.type == "cpu" and scores_BK is None:
        return [*map(_on_cpu, widen(logits_BV).numpy(), tokens_B)]
    chosen_B1 = torch.tensor(tokens_B, device=logits_BV.device)[:, None]
    weights_BV = logits_BV.softmax(dim=1, dtype=torch.float32)
    probability_B1 = weights_BV.gather(1, chosen_B1)
    weights_BK = weights_BV if scores_BK is None else scores_BK.softmax(dim=1, dtype=torch.float32)
    if ids_BK is None:
        others_BK = weights_BK.scatter(1, chosen_B1, 0.0)
    else:
        others_BK = weights_BK.masked_fill(ids_BK == chosen_B1, 0.0)
    best_B1, index_B1 = others_BK.max(dim=1, keepdim=True)
    runner_up_B1 = index_B1 if ids_BK is None else ids_BK.gather(1, index_B1)
    share_B1 = (best_B1 / others_BK.sum(dim=1, keepdim=True)).nan_to_num()
    return [
        TokenConfidence(probability=probability, runner_up=int(token), runner_up_share=share)
        for probability, token, share in to_list(
            torch.cat([probability_B1, runner_up_B1, share_B1], dim=1)
        )
    ]


def _on_cpu(logits_V: NDArray[np.floating[Any]], token: int) -> TokenConfidence:
    """Return what a row says; numpy takes a fraction of the time of torch."""
    weights_V = np.exp(logits_V - logits_V.max())
    probability = weights_V[token] / weights_V.sum()
    weights_V[token] = 0
    runner_up, rest = weights_V.argmax(), weights_V.sum()
    return TokenConfidence(
        probability=float(probability),
        runner_up=int(runner_up),
        runner_up_share=float(weights_V[runner_up] / rest) if rest > 0 else 0.0,
    )


@dataclass(slots=True, kw_only=True)
class Calibration:
    """How often tokens of a given probability were accepted; at first, as often as it says."""

    _accepted: list[float] = field(default_factory=lambda: [0.0] * BINS)
    _judged: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def acceptance_prob(self, probability: float) -> float:
        """Return the chance that a token of this probability is accepted."""
        index, prior = _bin(probability), PRIOR_TOKENS * probability
        return (self._accepted[index] + prior) / (self._judged[index] + PRIOR_TOKENS)

    def learn(self, probability: float, *, accepted: bool) -> None:
        """Record the verdict on a token."""
        index, kept = _bin(probability), 1 - 1 / MEMORY
        self._accepted[index] = kept * self._accepted[index] + accepted
        self._judged[index] = kept * self._judged[index] + 1


def _bin(probability: float) -> int:
    return min(BINS - 1, int(BINS * probability))
