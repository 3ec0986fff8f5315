"""Pairs of tiny encoder-decoders in folders, with a tokenizer each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tests.engine.architectures import VOCABULARY
from tests.engine.encoder_decoders import MODELS, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NOISE = 0.02  # of the drafter's weights, as a share of the expert's
PENALTY = 5.0  # of repetition, without which random models write one token again and again


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a SentencePiece-like tokenizer that ends texts as the model's family does."""
    config = MODELS[name][1]
    order = sorted(
        [(config["pad_token_id"], "<pad>"), (config["eos_token_id"], "</s>")]
        + ([(config["bos_token_id"], "<s>")] if "bos_token_id" in config else [])
    )
    special = [token for _, token in order]
    letters = "abcdefghijklmnopqrstuvwxyz.,!?-"
    pieces = [*special, "<unk>", "\u2581", *letters, *(f"\u2581{one}" for one in letters)]
    pieces += [first + second for first in letters for second in letters]
    pieces = list(dict.fromkeys(pieces))[:VOCABULARY]
    scored = [(piece, -float(10 - len(piece))) for piece in pieces]
    backend = Tokenizer(models.Unigram(scored, unk_id=pieces.index("<unk>"), byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    end = config["eos_token_id"]
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    named: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


@dataclass(frozen=True)
class EncoderDecoderPair:
    """A drafter that often agrees with its expert, and the expert."""

    drafter: Path
    expert: Path
    start_ids: tuple[int, ...]
    stop_id: int

    def settings(self, **engine: Any) -> Application:
        """Return settings of the pair; both engines have the same."""
        engine = {"threads": 1, **engine}
        tiers = {"drafter": self.drafter, "expert": self.expert}
        return Application.model_validate(
            {name: {"model": str(path), "engine": engine} for name, path in tiers.items()}
        )

    def load(self) -> Any:
        """Return the expert as transformers loads it."""
        return AutoModelForSeq2SeqLM.from_pretrained(self.expert, dtype=torch.float32)


def save_pair(folder: Path, name: str, **settings: Any) -> EncoderDecoderPair:
    """Write a pair.

    Args:
        folder: Where to.
        name: One of `MODELS`.
        settings: Replace those of the configuration.
    """
    # `generate` of transformers 5.23 makes a cache of as many layers as the encoder has.
    depth = "num_decoder_layers" if "d_kv" in MODELS[name][1] else "decoder_layers"
    settings = {depth: 2, **settings}
    expert, drafter = build(name, **settings), build(name, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * weight.std() * _NOISE)
    own = tokenizer(name)
    for role, model in (("drafter", drafter), ("expert", expert)):
        model.save_pretrained(folder / role)
        own.save_pretrained(folder / role)
    config = MODELS[name][1]
    return EncoderDecoderPair(
        drafter=folder / "drafter",
        expert=folder / "expert",
        start_ids=(config["decoder_start_token_id"],),
        stop_id=config["eos_token_id"],
    )


def sources(count: int) -> list[tuple[int, ...]]:
    """Return sources of 3 to 60 tokens, a few of them twice."""
    chance = torch.Generator().manual_seed(11)
    found: list[tuple[int, ...]] = []
    for index in range(count):
        length = int(torch.randint(3, 60, (), generator=chance))
        ids = torch.randint(5, VOCABULARY, (length,), generator=chance)
        found.append(found[-1] if index % 10 == 9 else tuple(ids.tolist()))
    return found


def greedy_answers(
    model: Any, sources: Sequence[tuple[int, ...]], *, longest: int
) -> list[tuple[int, ...]]:
    """Return what plain `generate` writes for each source, without the start token."""
    with torch.inference_mode():
        texts = [
            model.generate(
                torch.tensor([source]),
                attention_mask=torch.ones(1, len(source), dtype=torch.long),
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                repetition_penalty=PENALTY,
            )
            for source in sources
        ]
    return [tuple(text[0, 1:].tolist()) for text in texts]
