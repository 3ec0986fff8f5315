"""Documents to learn from: items phrased as chats or as plain text, with their answers marked.

`B` documents of a batch, `T` tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cascade.evaluation.tasks import Family, Split, stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cascade.evaluation.tasks import Item
    from cascade.training.train import Recipe

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

_SPECIAL = [PAD, END, SYSTEM, USER, ASSISTANT]

# One digit a token, so that sums are learned by place; else as in GPT-2.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CHAT_TEMPLATE = """\
{%- set tags = {'system': 'system', 'developer': 'system', 'user': 'user', 'tool': 'user', \
'assistant': 'assistant'} -%}
{%- for message in messages -%}
{%- if message['role'] not in tags -%}
{{- raise_exception('the role ' ~ message['role'] ~ ' is not one of ' ~ tags | join(', ')) -}}
{%- endif -%}
{{- '<|' ~ tags[message['role']] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of `token`, which must be in the vocabulary."""
    return tokenizer.get_vocab()[token]


def train_tokenizer(texts: Iterable[str], *, size: int, context: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens learned from `texts`; any text decodes to itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
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

_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful assistant. Answer the question.",
)

# What is learned slowly is read more often.
_SHARES = {
    Family.PASSAGES: 4.0, Family.PROBLEMS: 2.0, Family.TRANSLATION: 2.0,
    Family.REPORTS: 1.0, Family.FUNCTIONS: 1.0, Family.FACTS: 1.0,
}  # fmt: skip

_PLAIN_SHARE, _SYSTEM_SHARE, _SECOND_TURN_SHARE = 0.15, 0.1, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded documents; `labels_BT` is IGNORED wherever nothing is to be learned."""

    tokens_BT: Tensor
    labels_BT: Tensor
    styled_BT: Tensor  # bool: here an answer could have gone on in the other style

    def to(self, device: str) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            tokens_BT=self.tokens_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            styled_BT=self.styled_BT.to(device),
        )


class Part(NamedTuple):
    """A piece of a document."""

    text: str
    learned: bool = False  # a piece of an answer
    other: str | None = None  # how the answer could have gone on instead


class Encoded(NamedTuple):
    """A document as tokens; all lists are as long."""

    tokens: list[int]
    labels: list[int]
    styled: list[bool]


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, seed: str) -> list[Batch]:
    """Return the groups of one step, each of documents of like length, so that little is padding.

    The same seed gives the same batches.
    """
    size = recipe.documents // recipe.groups
    drawn = islice(documents(seed, formal=recipe.formal), size * recipe.groups)
    encoded = sorted(
        (encode(tokenizer, parts) for parts in drawn), key=lambda document: len(document.tokens)
    )
    return [_pad(tokenizer, encoded[at : at + size]) for at in range(0, len(encoded), size)]


def documents(seed: str, *, formal: float) -> Iterator[list[Part]]:
    """Yield training documents without end; `formal` is the share of answers in that style."""
    items = stream(f"{seed}/items", split=Split.TRAIN, shares=_SHARES)
    random = Random(f"{seed}/form")  # noqa: S311 - a data set, no secret
    for item in items:
        if random.random() < _PLAIN_SHARE:
            yield [Part(item.prompt), Part("\n", learned=True), *_answer(random, item, formal)]
            continue
        turns = [item, next(items)] if random.random() < _SECOND_TURN_SHARE else [item]
        yield _chat(random, turns, formal=formal)


def _chat(random: Random, turns: Sequence[Item], *, formal: float) -> list[Part]:
    parts: list[Part] = []
    if random.random() < _SYSTEM_SHARE:
        parts.append(Part(SYSTEM + random.choice(_SYSTEM_LINES) + END))
    for item in turns:
        parts.append(Part(USER + item.prompt + END + ASSISTANT))
        parts.extend(_answer(random, item, formal))
    return parts


def _answer(random: Random, item: Item, formal: float) -> Iterator[Part]:
    for part in item.answer:
        if isinstance(part, str):
            yield Part(part, learned=True)
        elif random.random() < formal:
            yield Part(part.formal, learned=True, other=part.short)
        else:
            yield Part(part.short, learned=True, other=part.formal)
    yield Part(END, learned=True)


def encode(tokenizer: PreTrainedTokenizerFast, parts: Sequence[Part]) -> Encoded:
    """Return a document as tokens, with what is learned and where styles part."""
    tokens: list[int] = []
    labels: list[int] = []
    styled: set[int] = set()
    for part in parts:
        ids: list[int] = tokenizer.encode(part.text)
        if part.other is not None and part.other != part.text:
            styled.add(len(tokens) + _parting(ids, tokenizer.encode(part.other)))
        tokens += ids
        labels += ids if part.learned else [IGNORED] * len(ids)
    return Encoded(tokens, labels, [place in styled for place in range(len(tokens))])


def _parting(ids: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(ids, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(ids), len(other)))


def _pad(tokenizer: PreTrainedTokenizerFast, encoded: Sequence[Encoded]) -> Batch:
    longest = max(len(document.tokens) for document in encoded)
    pad = token_id(tokenizer, PAD)
    return Batch(
        tokens_BT=torch.tensor([_filled(document.tokens, longest, pad) for document in encoded]),
        labels_BT=torch.tensor(
            [_filled(document.labels, longest, IGNORED) for document in encoded]
        ),
        styled_BT=torch.tensor(
            [_filled(document.styled, longest, 0) for document in encoded]
        ).bool(),
    )


def _filled(values: Sequence[int], length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]
