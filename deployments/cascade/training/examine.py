"""Examine a pair on held-out items: `python -m cascade.demo.examine`.

Per family, the quality of each model's greedy answers and how often the drafter, shown the
expert's answer so far, would have drafted the expert's next token: the share of drafts that
lossless speculation accepts at temperature 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cascade.demo import DRAFTER, EXPERT
from cascade.evaluation.tasks import Family, Item, held_out, score
from cascade.training.corpus import ASSISTANT, END, PAD, USER, token_id

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one family showed; every number is a share."""

    family: Family
    drafter: float
    expert: float
    agreement: float
    same: float  # of answers that are equal, letter for letter


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models in float32 and the tokenizer they share."""

    drafter: PreTrainedModel
    expert: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load(*, drafter: Path = DRAFTER, expert: Path = EXPERT) -> Pair:
    """Return a pair from its folders; the pair that ships if none are named."""
    models = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (drafter, expert)
    )
    return Pair(
        drafter=next(models), expert=next(models), tokenizer=AutoTokenizer.from_pretrained(expert)
    )


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[list[int]]:
    """Return the greedy answer to each prompt as tokens, the end token left out."""
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END)
    batch = tokenizer(
        [USER + prompt + END + ASSISTANT for prompt in prompts],
        padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    generate: Any = model.generate  # a Tensor to the type checker, since modules have dynamic names
    width = batch["input_ids"].shape[1]
    made: torch.Tensor = generate(**batch, max_new_tokens=_MAX_TOKENS, do_sample=False)[:, width:]
    return [[token for token in row if token not in (pad, end)] for row in made.tolist()]


@torch.inference_mode()
def agreement(drafter: PreTrainedModel, *, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the share of `answer` that the drafter, given what precedes, would have said."""
    tokens_1T = torch.tensor([[*prompt, *answer]])
    guesses_T = drafter(input_ids=tokens_1T).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return float((guesses_T == torch.tensor(answer)).float().mean())


def examine(family: Family, *, pair: Pair, count: int) -> Result:
    """Return what `count` held-out items of `family` show."""
    items = held_out(family, count=count)
    prompts = [item.prompt for item in items]
    drafted = answers(pair.drafter, pair.tokenizer, prompts)
    judged = answers(pair.expert, pair.tokenizer, prompts)
    end = token_id(pair.tokenizer, END)
    agreed = [
        agreement(
            pair.drafter,
            prompt=pair.tokenizer.encode(USER + prompt + END + ASSISTANT),
            answer=[*answer, end],
        )
        for prompt, answer in zip(prompts, judged, strict=True)
    ]
    return Result(
        family=family,
        drafter=_quality(items, pair.tokenizer, drafted),
        expert=_quality(items, pair.tokenizer, judged),
        agreement=fmean(agreed),
        same=fmean(first == second for first, second in zip(drafted, judged, strict=True)),
    )


def _quality(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, made: Sequence[list[int]]
) -> float:
    texts = [str(tokenizer.decode(tokens)) for tokens in made]
    return fmean(score(item, text) for item, text in zip(items, texts, strict=True))


def main(
    *,
    drafter: Annotated[Path, typer.Option(help="Folder of the drafter")] = DRAFTER,
    expert: Annotated[Path, typer.Option(help="Folder of the expert")] = EXPERT,
    count: Annotated[int, typer.Option(min=1, help="Held-out items of each family")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads")] = 1,
) -> None:
    """Print a table of accuracy and agreement over the families."""
    torch.set_num_threads(threads)
    pair = load(drafter=drafter, expert=expert)
    table = Table("family", "drafter", "expert", "agreement", "same answer")
    for family in Family:
        result = examine(family, pair=pair, count=count)
        shares = (result.drafter, result.expert, result.agreement, result.same)
        table.add_row(family.value, *(f"{share:.2f}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
