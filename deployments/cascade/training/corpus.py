"""Training documents: items phrased as chats or as plain text, with labels on their answers.

Shapes: `B` documents of a batch, `T` tokens of the longest.
"""

from __future__ import annotations

from itertools import islice, takewhile
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from cascade.demo import EXPERT
from cascade.evaluation.tasks import Split, TaskFamily, stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cascade.evaluation.tasks import Item
    from cascade.training.recipes import Recipe

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

_SPECIAL = [PAD, END, SYSTEM, USER, ASSISTANT]

# As in GPT-2, but with one token per digit, so that the model learns to add digit by digit.
_PRE_TOKENS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CHAT_TEMPLATE = (EXPERT / "chat_template.jinja").read_text()


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of `token`, which must be in the vocabulary."""
    return tokenizer.get_vocab()[token]


def train_tokenizer(texts: Iterable[str], *, size: int, context: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text decodes to itself.

    Args:
        texts: To learn from.
        size: Tokens of the vocabulary, at most.
        context: The models' context length in tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


IGNORED = -100  # the label that PyTorch's losses skip

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful assistant. Answer the question.",
)

# Families that take longer to learn come more often.
_SHARES = {
    TaskFamily.PASSAGES: 4.0, TaskFamily.PROBLEMS: 2.0, TaskFamily.TRANSLATION: 2.0,
    TaskFamily.REPORTS: 1.0, TaskFamily.FUNCTIONS: 1.0, TaskFamily.FACTS: 1.0,
}  # fmt: skip

_PLAIN_SHARE, _SYSTEM_SHARE, _SECOND_TURN_SHARE = 0.15, 0.1, 0.1


class Batch(NamedTuple):
    """Padded documents; `labels_BT` is IGNORED outside answers."""

    tokens_BT: Tensor
    labels_BT: Tensor
    is_choice_BT: Tensor  # bool: here the answer could have continued in the other style

    def to(self, device: str) -> Batch:
        """Return the batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))


class Part(NamedTuple):
    """A piece of a document."""

    text: str
    is_answer: bool = False
    alternative: str | None = None  # the piece in the other style


class Encoded(NamedTuple):
    """A document as tokens, with a label and a flag for each."""

    tokens: list[int]
    labels: list[int]
    is_choice: list[bool]


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, seed: str) -> list[Batch]:
    """Return the batches of one step, each of documents of similar length to save padding.

    Args:
        tokenizer: Of the models.
        recipe: Says how many documents and batches, and the share of formal answers.
        seed: The same seed returns the same batches.
    """
    size = recipe.documents // recipe.groups
    sampled = islice(documents(seed, formal=recipe.formal), size * recipe.groups)
    encoded = sorted(
        (encode(tokenizer, parts) for parts in sampled), key=lambda document: len(document.tokens)
    )
    pad = token_id(tokenizer, PAD)
    return [_pad(encoded[start : start + size], pad) for start in range(0, len(encoded), size)]


def documents(seed: str, *, formal: float) -> Iterator[list[Part]]:
    """Yield training documents without end; `formal` is the share of answers in that style."""
    items = stream(f"{seed}/items", split=Split.TRAIN, shares=_SHARES)
    random = Random(f"{seed}/form")  # noqa: S311 - a data set, no secret
    for item in items:
        if random.random() < _PLAIN_SHARE:
            yield [Part(item.prompt), Part("\n", is_answer=True), *_answer(random, item, formal)]
            continue
        turns = [item, next(items)] if random.random() < _SECOND_TURN_SHARE else [item]
        has_system = random.random() < _SYSTEM_SHARE
        chat = [Part(SYSTEM + random.choice(_SYSTEM_PROMPTS) + END)] if has_system else []
        for turn in turns:
            chat += [
                Part(USER + turn.prompt + END + ASSISTANT),
                *_answer(random, turn, formal),
            ]
        yield chat


def _answer(random: Random, item: Item, formal: float) -> Iterator[Part]:
    for part in item.answer:
        if isinstance(part, str):
            yield Part(part, is_answer=True)
        elif random.random() < formal:
            yield Part(part.formal, is_answer=True, alternative=part.short)
        else:
            yield Part(part.short, is_answer=True, alternative=part.formal)
    yield Part(END, is_answer=True)


def encode(tokenizer: PreTrainedTokenizerFast, parts: Sequence[Part]) -> Encoded:
    """Return a document as tokens, with labels and the positions where the styles diverge."""
    tokens: list[int] = []
    labels: list[int] = []
    choices: set[int] = set()
    for part in parts:
        ids: list[int] = tokenizer.encode(part.text)
        if part.alternative is not None and part.alternative != part.text:
            pairs = zip(ids, tokenizer.encode(part.alternative), strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            choices.add(len(tokens) + shared)
        tokens += ids
        labels += ids if part.is_answer else [IGNORED] * len(ids)
    return Encoded(tokens, labels, [position in choices for position in range(len(tokens))])


def _pad(encoded: Sequence[Encoded], pad: int) -> Batch:
    return Batch(
        *(
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
            for rows, value in zip(zip(*encoded, strict=True), (pad, IGNORED, False), strict=True)
        )
    )
