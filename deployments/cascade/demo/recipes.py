"""How the pair is made: sizes, length of training, and what each model reads."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is made."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    formal: float  # share of answers in the formal style
    learning_rate: float
    documents: int = 96  # of one step
    groups: int = 6  # of one step, each of documents of like length
    distilled: float = 0.0  # share of the loss that is learned from the expert's distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe:
    """How a pair is made; `models` are trained in order, a distilled one after the expert."""

    vocabulary: int  # at most; a corpus of few words fills less
    models: Mapping[str, Recipe]


PAIR = PairRecipe(
    vocabulary=4096,
    models=MappingProxyType(
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
    ),
)  # fmt: skip
