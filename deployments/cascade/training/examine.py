"""Examines a pair on held-out items: `python -m cascade.training.examine`.

Reports for each family the quality of both models' greedy answers, and the agreement: how often
the drafter, given the expert's answer so far, predicts the expert's next token. That is the share
of drafted tokens that lossless speculation accepts at temperature 0.
"""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from cascade.evaluation.scoring import score
from cascade.evaluation.tasks import Item, TaskFamily, held_out
from cascade.training.corpus import ASSISTANT, END, PAD, USER, token_id

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_TOKENS = 96


class Result(NamedTuple):
    """The result for one family; all numbers are shares."""

    drafter: float
    expert: float
    agreement: float
    same: float  # of answers that are equal


class Pair(NamedTuple):
    """Two models in float32 and the tokenizer they share."""

    drafter: PreTrainedModel
    expert: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load(*, drafter: Path = DRAFTER, expert: Path = EXPERT) -> Pair:
    """Return a pair from its folders; by default the shipped pair."""
    models = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (drafter, expert)
    )
    return Pair(*models, tokenizer=AutoTokenizer.from_pretrained(expert))


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[list[int]]:
    """Return the greedy answer to each prompt as tokens, without the end token.

    Args:
        model: Which model answers.
        tokenizer: Of the model.
        prompts: Sent as user messages, in one batch.
    """
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END)
    batch = tokenizer(
        [USER + prompt + END + ASSISTANT for prompt in prompts],
        padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    generate: Any = model.generate  # a Tensor to the type checker, since modules have dynamic names
    width = batch["input_ids"].shape[1]
    tokens: torch.Tensor = generate(**batch, max_new_tokens=_MAX_TOKENS, do_sample=False)[:, width:]
    return [[token for token in answer if token not in (pad, end)] for answer in tokens.tolist()]


@torch.inference_mode()
def agreement(drafter: PreTrainedModel, *, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the share of `answer` that the drafter predicts from the tokens before.

    Args:
        drafter: Which model predicts.
        prompt: Token ids.
        answer: Token ids.
    """
    tokens_1T = torch.tensor([[*prompt, *answer]])
    predicted_T = drafter(input_ids=tokens_1T).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return float((predicted_T == torch.tensor(answer)).float().mean())


def examine(family: TaskFamily, *, pair: Pair, count: int) -> Result:
    """Return the result for `count` held-out items of `family`."""
    items = held_out(family, count=count)
    prompts = [item.prompt for item in items]
    by_drafter, by_expert = (
        greedy_answers(model, pair.tokenizer, prompts) for model in (pair.drafter, pair.expert)
    )
    end = token_id(pair.tokenizer, END)
    agreements = [
        agreement(
            pair.drafter,
            prompt=pair.tokenizer.encode(USER + prompt + END + ASSISTANT),
            answer=[*answer, end],
        )
        for prompt, answer in zip(prompts, by_expert, strict=True)
    ]
    return Result(
        drafter=_quality(items, pair.tokenizer, by_drafter),
        expert=_quality(items, pair.tokenizer, by_expert),
        agreement=fmean(agreements),
        same=fmean(first == second for first, second in zip(by_drafter, by_expert, strict=True)),
    )


def _quality(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, answers: Sequence[list[int]]
) -> float:
    texts = [str(tokenizer.decode(tokens)) for tokens in answers]
    return fmean(
        score(item.scorer, text, item.references) for item, text in zip(items, texts, strict=True)
    )


def main(
    *,
    drafter: Annotated[Path, typer.Option(help="Folder of the drafter")] = DRAFTER,
    expert: Annotated[Path, typer.Option(help="Folder of the expert")] = EXPERT,
    count: Annotated[int, typer.Option(min=1, help="Held-out items of each family")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads")] = 1,
) -> None:
    """Print a table of quality and agreement for each family."""
    torch.set_num_threads(threads)
    pair = load(drafter=drafter, expert=expert)
    table = Table("family", "drafter", "expert", "agreement", "same answer")
    for family in TaskFamily:
        result = examine(family, pair=pair, count=count)
        table.add_row(family.value, *(f"{share:.2f}" for share in result))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
