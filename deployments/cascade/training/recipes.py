"""The models of the shipped pair and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The shape of one model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    formal: float  # share of answers in the formal style
    learning_rate: float
    documents: int = 96  # of one step
    groups: int = 6  # batches of one step, each of documents of similar length
    distilled: float = 0.0  # share of the loss that is the divergence from the expert


# Trained in this order: a distilled model comes after the expert.
PAIR: Mapping[str, Recipe] = MappingProxyType(
    {
        "expert": Recipe(
            hidden=320, layers=6, heads=5, intermediate=1024, steps=1500, formal=0.85,
            learning_rate=4e-3,
        ),
        "drafter": Recipe(
            hidden=192, layers=2, heads=3, intermediate=512, steps=380, formal=0.3,
            learning_rate=4e-3, distilled=0.5,
        ),
    }
)  # fmt: skip
