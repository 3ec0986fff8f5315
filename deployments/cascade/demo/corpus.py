"""Documents to learn from: items phrased as chats or as plain text, with their answers marked.

`B` documents of a batch, `T` tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.demo.tasks import Family, Split, stream
from cascade.demo.vocabulary import ASSISTANT, END, PAD, SYSTEM, USER, token_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

    from cascade.demo.recipes import Recipe
    from cascade.demo.tasks import Item

IGNORED = -100  # the label that PyTorch's losses skip
_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful assistant. Answer the question.",
)
# What is learned slowly is read more often.
_SHARES = {
    Family.PASSAGES: 3.0, Family.PROBLEMS: 2.0, Family.TRANSLATION: 1.5,
    Family.REPORTS: 1.0, Family.FUNCTIONS: 0.5, Family.FACTS: 0.5,
}  # fmt: skip
_PLAIN_SHARE, _SYSTEM_SHARE, _SECOND_TURN_SHARE = 0.15, 0.1, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded documents; `labels_BT` is IGNORED wherever nothing is to be learned."""

    tokens_BT: Tensor
    labels_BT: Tensor

    def to(self, device: str) -> Batch:
        """Return the batch on `device`."""
        return Batch(tokens_BT=self.tokens_BT.to(device), labels_BT=self.labels_BT.to(device))


Part = tuple[str, bool]  # text, and whether it is an answer


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, seed: str) -> list[Batch]:
    """Return the groups of one step, each of documents of like length, so that little is padding.

    The same seed gives the same batches.
    """
    size = recipe.documents // recipe.groups
    drawn = islice(documents(seed, formal=recipe.formal), size * recipe.groups)
    encoded = sorted((_encode(tokenizer, parts) for parts in drawn), key=lambda pair: len(pair[0]))
    return [_pad(tokenizer, encoded[at : at + size]) for at in range(0, len(encoded), size)]


def documents(seed: str, *, formal: float) -> Iterator[list[Part]]:
    """Yield training documents without end; `formal` is the share of answers in that style."""
    items = stream(f"{seed}/items", split=Split.TRAIN, shares=_SHARES)
    random = Random(f"{seed}/form")  # noqa: S311 - a data set, no secret
    for item in items:
        if random.random() < _PLAIN_SHARE:
            yield [(item.prompt, False), ("\n" + _answer(random, item, formal) + END, True)]
            continue
        turns = [item, next(items)] if random.random() < _SECOND_TURN_SHARE else [item]
        yield _chat(random, turns, formal=formal)


def _chat(random: Random, turns: Sequence[Item], *, formal: float) -> list[Part]:
    parts: list[Part] = []
    if random.random() < _SYSTEM_SHARE:
        parts.append((SYSTEM + random.choice(_SYSTEM_LINES) + END, False))
    for item in turns:
        parts.append((USER + item.prompt + END + ASSISTANT, False))
        parts.append((_answer(random, item, formal) + END, True))
    return parts


def _answer(random: Random, item: Item, formal: float) -> str:
    return item.formal if random.random() < formal else item.short


def _encode(
    tokenizer: PreTrainedTokenizerFast, parts: Sequence[Part]
) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    labels: list[int] = []
    for text, is_answer in parts:
        ids: list[int] = tokenizer.encode(text)
        tokens += ids
        labels += ids if is_answer else [IGNORED] * len(ids)
    return tokens, labels


def _pad(
    tokenizer: PreTrainedTokenizerFast, encoded: Sequence[tuple[list[int], list[int]]]
) -> Batch:
    longest = max(len(tokens) for tokens, _ in encoded)
    pad = token_id(tokenizer, PAD)
    return Batch(
        tokens_BT=torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in encoded]),
        labels_BT=torch.tensor([ids + [IGNORED] * (longest - len(ids)) for _, ids in encoded]),
    )
