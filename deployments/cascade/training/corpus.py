"""Training documents: items phrased as chats or as plain text, with labels on their answers.

Shapes: `B` documents of a batch, `T` tokens of the longest, `S` tokens of the longest source.
"""

from __future__ import annotations

from itertools import islice, takewhile
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from cascade.demo import EXPERT
from cascade.evaluation.tasks import Split, stream
from cascade.training.recipes import SHARES, Architecture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cascade.evaluation.tasks import Item
    from cascade.training.recipes import Recipe

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

_SPECIAL = [PAD, END, SYSTEM, USER, ASSISTANT]

# As in GPT-2, but with one token per digit, so that the model learns to add digit by digit.
_PRE_TOKENS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CHAT_TEMPLATES = {
    Architecture.CAUSAL: (EXPERT / "chat_template.jinja").read_text(),
    # An encoder reads what was said, line by line, and knows no roles.
    Architecture.SEQ2SEQ: (
        "{%- for message in messages -%}"
        "{{- message['content'] -}}{{- '\n' if not loop.last -}}"
        "{%- endfor -%}"
        f"{{{{- '{END}' -}}}}"
    ),
}


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of `token`, which must be in the vocabulary."""
    return tokenizer.get_vocab()[token]


def train_tokenizer(
    texts: Iterable[str],
    *,
    size: int,
    context: int,
    architecture: Architecture = Architecture.CAUSAL,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text decodes to itself.

    Args:
        texts: To learn from.
        size: Tokens of the vocabulary, at most.
        context: The models' context length in tokens.
        architecture: Of the models; what an encoder reads ends with the end token, as in T5.
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
    if architecture is Architecture.SEQ2SEQ:
        core.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, core.get_vocab()[END])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=_CHAT_TEMPLATES[architecture],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


IGNORED = -100  # the label that PyTorch's losses skip

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful assistant. Answer the question.",
)

_PLAIN_SHARE, _SYSTEM_SHARE, _SECOND_TURN_SHARE = 0.15, 0.1, 0.1


class Batch(NamedTuple):
    """Padded documents; `labels_BT` is IGNORED outside answers."""

    tokens_BT: Tensor  # with an encoder: what the decoder reads
    labels_BT: Tensor
    is_choice_BT: Tensor  # bool: here the answer could have continued in the other style
    source_BS: Tensor  # what the encoder reads; without one, S is 0

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
    source: list[int]


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, seed: str) -> list[Batch]:
    """Return the batches of one step, each of documents of similar length to save padding.

    Args:
        tokenizer: Of the models.
        recipe: Says how many documents and batches, and the share of formal answers.
        seed: The same seed returns the same batches.
    """
    size = recipe.documents // recipe.groups
    architecture = recipe.architecture
    sampled = islice(
        documents(seed, formal=recipe.formal, architecture=architecture), size * recipe.groups
    )
    encoded = sorted(
        (encode(tokenizer, parts, architecture=architecture) for parts in sampled),
        key=lambda document: len(document.source or document.tokens),
    )
    pad = token_id(tokenizer, PAD)
    return [_pad(encoded[start : start + size], pad) for start in range(0, len(encoded), size)]


def documents(
    seed: str, *, formal: float, architecture: Architecture = Architecture.CAUSAL
) -> Iterator[list[Part]]:
    """Yield training documents without end.

    Args:
        seed: The same seed yields the same documents.
        formal: Share of answers in that style.
        architecture: Of the model; one with an encoder reads a single question and no roles.
    """
    items = stream(f"{seed}/items", split=Split.TRAIN, shares=SHARES[architecture])
    random = Random(f"{seed}/form")  # noqa: S311 - a data set, no secret
    for item in items:
        if architecture is Architecture.SEQ2SEQ:
            yield [Part(item.prompt + END), *_answer(random, item, formal)]
            continue
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


def encode(
    tokenizer: PreTrainedTokenizerFast,
    parts: Sequence[Part],
    *,
    architecture: Architecture = Architecture.CAUSAL,
) -> Encoded:
    """Return a document as tokens, with labels and the positions where the styles diverge.

    Args:
        tokenizer: Of the models.
        parts: The document.
        architecture: Of the model; an encoder reads the parts that are no answer, and its decoder
            starts from the padding token.
    """
    has_encoder = architecture is Architecture.SEQ2SEQ
    source: list[int] = []
    tokens = [token_id(tokenizer, PAD)] if has_encoder else []
    labels = [IGNORED] * len(tokens)
    choices: set[int] = set()
    for part in parts:
        ids: list[int] = tokenizer.encode(part.text, add_special_tokens=False)
        if has_encoder and not part.is_answer:
            source += ids
            continue
        if part.alternative is not None and part.alternative != part.text:
            other = tokenizer.encode(part.alternative, add_special_tokens=False)
            pairs = zip(ids, other, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            choices.add(len(tokens) + shared)
        tokens += ids
        labels += ids if part.is_answer else [IGNORED] * len(ids)
    is_choice = [position in choices for position in range(len(tokens))]
    return Encoded(tokens, labels, is_choice, source)


def _pad(encoded: Sequence[Encoded], pad: int) -> Batch:
    return Batch(
        *(
            pad_sequence(
                [
                    torch.tensor(row, dtype=torch.bool if value is False else torch.long)
                    for row in rows
                ],
                batch_first=True,
                padding_value=value,
            )
            for rows, value in zip(
                zip(*encoded, strict=True), (pad, IGNORED, False, pad), strict=True
            )
        )
    )
