"""How the pairs are made: sizes, length of training, and what each model reads."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from cascade.demo.tasks import ALL_LEVELS, PROVISIONAL_LEVELS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade.demo.tasks import Level

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
    levels: tuple[Level, ...] = PROVISIONAL_LEVELS
    documents: int = 64  # of one step
    groups: int = 4  # of one step, each of documents of like length
    learning_rate: float = 4e-3
    distilled: float = 0.0  # share of the loss that is learned from the expert's distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe:
    """How a pair is made; `models` are trained in order, a distilled one after the expert."""

    vocabulary: int
    models: Mapping[str, Recipe]

    @property
    def levels(self) -> tuple[Level, ...]:
        """Return what the tokenizer must know words of."""
        return max((recipe.levels for recipe in self.models.values()), key=len)


PROVISIONAL = PairRecipe(
    vocabulary=1024,
    models=MappingProxyType(
        {
            "expert": Recipe(
                hidden=128, layers=4, heads=4, intermediate=448, steps=1400, formal=0.85
            ),
            "drafter": Recipe(
                hidden=64, layers=2, heads=2, intermediate=160, steps=1000, formal=0.3
            ),
        }
    ),
)
FULL = PairRecipe(
    vocabulary=4096,
    models=MappingProxyType(
        {
            "expert": Recipe(
                hidden=320, layers=6, heads=5, intermediate=1024, steps=1800, formal=0.85,
                levels=ALL_LEVELS, documents=96, groups=6, learning_rate=3e-3,
            ),
            "drafter": Recipe(
                hidden=192, layers=2, heads=3, intermediate=512, steps=1800, formal=0.3,
                levels=ALL_LEVELS, documents=96, groups=6, distilled=0.5,
            ),
        }
    ),
)  # fmt: skip
PAIRS: Mapping[str, PairRecipe] = MappingProxyType({"provisional": PROVISIONAL, "full": FULL})
