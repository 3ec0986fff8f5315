"""The models of the shipped pairs and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from cascade.evaluation.tasks import TaskFamily

if TYPE_CHECKING:
    from collections.abc import Mapping


class Architecture(StrEnum):
    """The kinds of models that are trained."""

    CAUSAL = "causal"  # Llama: reads the prompt and continues it
    SEQ2SEQ = "seq2seq"  # T5: an encoder reads the prompt, a decoder writes the answer


# Families that take longer to learn come more often.
SHARES: Mapping[Architecture, Mapping[TaskFamily, float]] = MappingProxyType(
    {
        Architecture.CAUSAL: {
            TaskFamily.PASSAGES: 4.0, TaskFamily.PROBLEMS: 2.0, TaskFamily.TRANSLATION: 2.0,
            TaskFamily.REPORTS: 1.0, TaskFamily.FUNCTIONS: 1.0, TaskFamily.FACTS: 1.0,
        },
        Architecture.SEQ2SEQ: {
            TaskFamily.PASSAGES: 4.0, TaskFamily.TRANSLATION: 2.0, TaskFamily.REPORTS: 1.0,
        },
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The shape of one model and how it is trained."""

    hidden: int
    layers: int  # with Architecture.SEQ2SEQ of the encoder, and as many of the decoder
    heads: int
    intermediate: int
    steps: int
    formal: float  # share of answers in the formal style
    learning_rate: float
    documents: int = 96  # of one step
    groups: int = 6  # batches of one step, each of documents of similar length
    distilled: float = 0.0  # share of the loss that is the divergence from the expert
    architecture: Architecture = Architecture.CAUSAL


# Trained in this order: a distilled model comes after the expert.
PAIRS: Mapping[Architecture, Mapping[str, Recipe]] = MappingProxyType(
    {
        Architecture.CAUSAL: {
            "expert": Recipe(
                hidden=320, layers=6, heads=5, intermediate=1024, steps=1500, formal=0.85,
                learning_rate=4e-3,
            ),
            "drafter": Recipe(
                hidden=192, layers=2, heads=3, intermediate=512, steps=380, formal=0.3,
                learning_rate=4e-3, distilled=0.5,
            ),
        },
        Architecture.SEQ2SEQ: {
            "expert": Recipe(
                hidden=128, layers=4, heads=4, intermediate=384, steps=3000, formal=0.85,
                learning_rate=5e-3, architecture=Architecture.SEQ2SEQ,
            ),
            "drafter": Recipe(
                hidden=64, layers=1, heads=2, intermediate=192, steps=850, formal=0.3,
                learning_rate=5e-3, distilled=0.5, architecture=Architecture.SEQ2SEQ,
            ),
        },
    }
)  # fmt: skip
