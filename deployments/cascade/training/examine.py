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
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cascade.demo import DRAFTER, EXPERT
from cascade.evaluation.scoring import score
from cascade.evaluation.tasks import Item, TaskFamily, held_out
from cascade.training.corpus import END, PAD, token_id
from cascade.training.recipes import SHARES, Architecture

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
    models = (_load(folder).eval() for folder in (drafter, expert))
    return Pair(*models, tokenizer=AutoTokenizer.from_pretrained(expert))


def _load(folder: Path) -> PreTrainedModel:
    has_encoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind: Any = AutoModelForSeq2SeqLM if has_encoder else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32)


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Return a user message as the tokens that a model reads before it answers."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(str(text), add_special_tokens=False)


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
    batch = tokenizer.pad(
        {"input_ids": [prompt_tokens(tokenizer, prompt) for prompt in prompts]},
        padding_side="left", return_tensors="pt",
    )  # fmt: skip
    generate: Any = model.generate  # a Tensor to the type checker, since modules have dynamic names
    # A model with an encoder returns the answer after its start token.
    width = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
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
    if drafter.config.is_encoder_decoder:
        tokens_1T = torch.tensor([[drafter.config.decoder_start_token_id, *answer]])
        logits_1TV = drafter(input_ids=torch.tensor([prompt]), decoder_input_ids=tokens_1T).logits
        predicted_T = logits_1TV[0, :-1].argmax(-1)
    else:
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
            prompt=prompt_tokens(pair.tokenizer, prompt),
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
    has_encoder = pair.expert.config.is_encoder_decoder
    trained = SHARES[Architecture.SEQ2SEQ if has_encoder else Architecture.CAUSAL]
    for family in sorted(trained, key=list(TaskFamily).index):
        result = examine(family, pair=pair, count=count)
        table.add_row(family.value, *(f"{share:.2f}" for share in result))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
