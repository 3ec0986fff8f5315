"""Tiny tokenizers of every kind that decoder-only models have, by the way they decode."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from cascade.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CORPUS = ["hello world the cat sat, naïve café über " * 3]
UNKNOWN = "<unk>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>assistant:"
    "{% endif %}"
)


def wrap(backend: Backend, *, chat_template: str | None = None) -> Tokenizer:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    fast.chat_template = chat_template
    return Tokenizer(fast)


def byte_level(*, size: int = 280, added: tuple[str, ...] = ()) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    return backend


def metaspace() -> Backend:
    fallback = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    words = [("▁the", -1.0), ("▁cat", -1.0), ("s", -2.0), ("▁", -3.0)]
    letters = [(chr(code), -5.0) for code in range(97, 123)]
    vocabulary = [(UNKNOWN, 0.0), ("<s>", -9.0), ("</s>", -9.0), *fallback, *words, *letters]
    backend = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


WORDS = ["hello world the cat sat, don't. naïve café über 你好 🙂 A\u0301 \ufffd  end"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece(decoder: Sequence[decoders.Decoder]) -> Backend:
    """Return BPE on metaspace with byte fallback."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    trained.train_from_iterator(["hello world the cat sat, don't."] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [UNKNOWN, "<s>", "</s>", *BYTES, *model["vocab"], "▁▁"]
    backend = Backend(
        models.BPE(
            {token: id_ for id_, token in enumerate(tokens)},
            [tuple(merge) for merge in model["merges"]] + [("▁", "▁")],
            unk_token=UNKNOWN,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoder]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([UNKNOWN, "<s>", "</s>"])
    return backend


def llama_2() -> Backend:
    return _sentencepiece([decoders.Strip(" ", 1, 0)])


def mistral() -> Backend:
    """Its instructions are special tokens, and it has tokens that are not special."""
    backend = llama_2()
    backend.add_special_tokens(["[INST]", "[/INST]"])
    backend.add_tokens(["<tool>", "  "])
    return backend


def gemma() -> Backend:
    backend = _sentencepiece([])
    backend.normalizer = normalizers.Replace(" ", "▁")
    return backend


def unigram() -> Backend:
    """T5's: text that it does not know is lost, and the decoder drops spaces at the beginning."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=[UNKNOWN, "<s>", "</s>"],
        show_progress=False,
        unk_token=UNKNOWN,
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token=UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=[UNKNOWN, "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def word_ends() -> Backend:
    """The first GPT's: the end of a word is marked, so the last token never ends with a space."""
    backend = Backend(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=[UNKNOWN, "<s>", "</s>"],
        show_progress=False,
        end_of_word_suffix="</w>",
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def words() -> Backend:
    """Without a decoder tokens are joined with spaces."""
    backend = Backend(models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        special_tokens=[UNKNOWN, "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def llama_3() -> Backend:
    """Its special tokens are added behind the vocabulary, and some added ones are not special."""
    added = ("<|begin|>", "<|header|>", "<|eot|>")
    backend = byte_level(size=300, added=added)
    backend.add_tokens(["<think>", "\uff5cnaïve▁"])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    return backend


def fused() -> Backend:
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    kind.__name__: kind
    for kind in (
        byte_level,
        llama_3,
        fused,
        metaspace,
        llama_2,
        mistral,
        gemma,
        unigram,
        wordpiece,
        word_ends,
        words,
    )
}
