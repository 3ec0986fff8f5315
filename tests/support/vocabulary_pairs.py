"""Pairs of tiny models whose tokenizers were trained apart: byte-level BPE, SentencePiece's kinds.

A drafter is its expert with the rows of its embeddings in the order of its own tokens. So it agrees
with the expert wherever both read the same tokens, and some drafts are accepted: the last tokens
count more than those before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tests.conftest import Folder, Pair, random_model
from tests.support.toy_tokenizers import BYTES, UNKNOWN, WORDS
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
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cascade.engine.settings import VocabularyWay
from cascade.engine.tokenizer import Tokenizer
from cascade.engine.vocabulary import SAMPLE, VocabularyMap, map_vocabularies

if TYPE_CHECKING:
    from pathlib import Path

PROSE = [SAMPLE, *WORDS]
CODE = [SAMPLE.upper(), *WORDS, "def main() -> None:\n    return [x for x in range(10)]\n" * 3]


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer, as a checkpoint has it."""

    backend: Backend
    begin: str
    end: str

    @property
    def saved(self) -> PreTrainedTokenizerFast:
        names = {"bos_token": self.begin, "eos_token": self.end}
        unknown: dict[str, str] = {}
        if self.backend.token_to_id(UNKNOWN) is not None:
            unknown = {"unk_token": UNKNOWN}
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, **names, **unknown)


def llama_like() -> TokenizerFiles:
    """Return byte-level BPE whose texts begin with a token."""
    return _byte_level(PROSE, size=420, names=("<|begin_of_text|>", "<|eot_id|>"), begins=True)


def qwen_like() -> TokenizerFiles:
    """Return byte-level BPE with other merges, other names, and no token that begins texts."""
    return _byte_level(CODE, size=380, names=("<|endoftext|>", "<|im_end|>"), begins=False)


def _byte_level(
    texts: list[str], *, size: int, names: tuple[str, str], begins: bool
) -> TokenizerFiles:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    if begins:
        begin = (names[0], backend.token_to_id(names[0]))
        template = f"{names[0]} $A"
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[begin])
    return TokenizerFiles(backend=backend, begin=names[0], end=names[1])


def llama_2_like() -> TokenizerFiles:
    """Return SentencePiece's BPE on metaspace with byte fallback."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=240, show_progress=False)
    trained.train_from_iterator(PROSE, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [UNKNOWN, "<s>", "</s>", *BYTES, *model["vocab"]]
    backend = Backend(
        models.BPE(
            {token: id_ for id_, token in enumerate(tokens)},
            [tuple(merge) for merge in model["merges"]],
            unk_token=UNKNOWN,
            byte_fallback=True,
        )
    )
    return _sentencepiece(backend)


def unigram_like() -> TokenizerFiles:
    """Return SentencePiece's unigram model on metaspace with byte fallback."""
    trained = Backend(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    trained.train_from_iterator(PROSE, trainer)
    pieces: list[list[Any]] = json.loads(trained.to_str())["model"]["vocab"]
    special = [(UNKNOWN, 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary = [*special, *((one, -20.0) for one in BYTES), *map(tuple, pieces[1:])]
    return _sentencepiece(Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True)))


def _sentencepiece(backend: Backend) -> TokenizerFiles:
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(spaces)
    texts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*texts, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([UNKNOWN, "<s>", "</s>"])
    return TokenizerFiles(backend=backend, begin="<s>", end="</s>")


TOKENIZERS = {kind.__name__: kind for kind in (llama_like, qwen_like, llama_2_like, unigram_like)}


@dataclass(frozen=True, kw_only=True)
class VocabularyPair(Pair):
    """A drafter and an expert with different tokenizers, in folders."""

    vocabulary: VocabularyMap  # of the intersection

    @property
    def tokenizer(self) -> Tokenizer:
        return self.vocabulary.expert.tokenizer

    def prompts(self) -> list[tuple[int, ...]]:
        texts = ("The committee met on", "def mean(values", "caf\u00e9 \u4eca\u5929 {", "3x + 7")
        return [self.tokenizer.encode(text) for text in texts]


def make_pair(
    folder: Path, drafter: TokenizerFiles, expert: TokenizerFiles, *, seed: int = 1
) -> VocabularyPair:
    """Return a pair, written to a folder."""
    tokenizers = [Tokenizer(one.saved) for one in (drafter, expert)]
    ours, theirs = (one.size for one in tokenizers)
    sizes = {"drafter_size": ours, "expert_size": theirs}
    vocabulary = map_vocabularies(*tokenizers, **sizes, way=VocabularyWay.TLI)
    large = random_model(folder / "expert", vocabulary=theirs, width=32, layers=2, seed=seed)
    for name, weight in large.model.named_parameters():
        if name.endswith("self_attn.o_proj.weight"):
            weight.data *= 0.2
    large.model.save_pretrained(large.path)
    expert.saved.save_pretrained(large.path)
    small = random_model(folder / "drafter", vocabulary=ours, width=32, layers=2, seed=seed)
    drafter.saved.save_pretrained(small.path)
    return VocabularyPair(
        drafter=replace(small, model=_reordered(small, large, vocabulary)),
        expert=large,
        vocabulary=vocabulary,
    )


def _reordered(small: Folder, large: Folder, vocabulary: VocabularyMap) -> LlamaForCausalLM:
    """Return the drafter with the weights of the expert, for tokens that both have."""
    state, known = small.model.state_dict(), large.model.state_dict()
    ids = [list(one) for one in (vocabulary.pairs.values(), vocabulary.pairs)]
    for name, weight in state.items():
        if weight.shape == known[name].shape:
            weight.copy_(known[name])
        else:
            with torch.no_grad():
                weight[ids[0]] = known[name][ids[1]]
    small.model.load_state_dict(state)
    small.model.save_pretrained(small.path)
    return small.model
