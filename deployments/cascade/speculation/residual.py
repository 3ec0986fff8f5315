"""The laws that a correction or a bonus is drawn from, over the whole vocabulary.

Only here are rows as long as the vocabulary, one for each token that is emitted.

Shapes: `M` judged rows, `E` emissions, `K` tokens of the drafter's support, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.rules import Lossless
from cascade.sampling.sampler import Weights
from cascade.sampling.tensor_ops import to_list

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.probs import Probs
    from cascade.speculation.verify_batch import VerifyBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """One token to draw: from p, from pi of a judged row, or from what pi has over q there."""

    owner: int
    row: int  # of logits
    judged: int | None = None  # None draws from p
    factor: float = 1.0  # pi is scaled by this before q is taken off
    residual: bool = False


def dense_target(bench: VerifyBatch, law: Probs, index_E: Tensor) -> Tensor:
    """Return pi of chosen judged rows over the whole vocabulary, [E, V].

    Args:
        bench: The judged rows.
        law: The expert's processed rows at the chosen places, [E, V].
        index_E: Which judged rows.
    """
    target, support = bench.target, bench.support
    weights_EV = law.dense() * target.tail_N[index_E][:, None]
    ids_EK, valid_EK = support.ids_NK[index_E], support.valid_NK[index_E]
    return _written(weights_EV, ids_EK, valid_EK, target.on_NK[index_E])


def next_token_weights(bench: VerifyBatch, emissions: Sequence[NextToken]) -> Weights:
    """Return the laws that tokens are drawn from, unnormalised, E rows over the vocabulary.

    A residual that rounding left empty is replaced by pi.
    """
    rows_E = torch.tensor([e.row for e in emissions], device=bench.logits_NV.device)
    if all(e.judged is None for e in emissions):
        return Weights(weights_NK=bench.law.dense(rows_E))
    found = Weights(weights_NK=_over(bench, rows_E, emissions))
    empty_E = found.totals <= 0
    if not to_list(empty_E.any()):
        return found
    whole = [replace(e, factor=1.0, residual=False) for e in emissions]
    whole_EV = _over(bench, rows_E, whole)
    return Weights(weights_NK=torch.where(empty_E[:, None], whole_EV, found.weights_NK))


def _over(bench: VerifyBatch, rows_E: Tensor, emissions: Sequence[NextToken]) -> Tensor:
    """Return (factor pi - q)+ for residuals, pi for other judged rows and p for the rest."""
    weights_EV = bench.law.dense(rows_E)
    target, support = bench.target, bench.support
    index_E = torch.tensor([e.judged or 0 for e in emissions], device=weights_EV.device)
    judged_E = torch.tensor([e.judged is not None for e in emissions], device=weights_EV.device)
    factor_E = weights_EV.new_tensor([e.factor for e in emissions])
    less_E = weights_EV.new_tensor([float(e.residual) for e in emissions])
    scaled_EK = factor_E[:, None] * target.on_NK[index_E]
    on_EK = (scaled_EK - less_E[:, None] * bench.evidence.q_NK[index_E]).clamp_min(0)
    if not (isinstance(bench.policy.rule, Lossless) and all(e.factor == 1 for e in emissions)):
        weights_EV.mul_(torch.where(judged_E, factor_E * target.tail_N[index_E], 1.0)[:, None])
    valid_EK = support.valid_NK[index_E] & judged_E[:, None]
    return _written(weights_EV, support.ids_NK[index_E], valid_EK, on_EK)


def _written(weights_EV: Tensor, ids_EK: Tensor, valid_EK: Tensor, values_EK: Tensor) -> Tensor:
    """Return the weights with the values of the support written over them.

    Padding repeats a valid entry of its row, or what is there if there is none: so nothing is read
    back from the device to learn where the valid ones are.
    """
    some_E1 = valid_EK.to(torch.int8).argmax(dim=1, keepdim=True)
    ids_EK = torch.where(valid_EK, ids_EK, ids_EK.gather(1, some_E1))
    values_EK = torch.where(valid_EK, values_EK, values_EK.gather(1, some_E1))
    any_E1 = valid_EK.any(dim=1, keepdim=True)
    return weights_EV.scatter_(
        1, ids_EK, torch.where(any_E1, values_EK, weights_EV.gather(1, ids_EK))
    )
