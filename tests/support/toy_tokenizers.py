"""Tiny tokenizers of two kinds: byte-level BPE, and metaspace with byte fallback."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from cascade.engine.tokenizer import Tokenizer

CORPUS = ["hello world the cat sat, naïve café über " * 3]
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
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    return backend


def metaspace() -> Backend:
    fallback = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    words = [("▁the", -1.0), ("▁cat", -1.0), ("s", -2.0), ("▁", -3.0)]
    letters = [(chr(code), -5.0) for code in range(97, 123)]
    vocabulary = [("<unk>", 0.0), ("<s>", -9.0), ("</s>", -9.0), *fallback, *words, *letters]
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
