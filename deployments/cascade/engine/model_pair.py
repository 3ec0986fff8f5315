"""Check that two models can form a cascade, by their configurations and tokenizers alone.

Both must share a vocabulary. The API also takes the tokenizer and the limits of the pair from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from cascade.engine import tokenizer
from cascade.engine.model_loader import context_length, read_config, stop_ids
from cascade.errors import MismatchedPair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.engine.tokenizer import Tokenizer

_MAX_DIFFERENCES = 5  # in a message

# Normalisers and pre-tokenisers differ in case, composed and decomposed accents, widths, spaces,
# digits, scripts and joined emoji.
_TEXTS = (
    "The quick brown fox JUMPED over 1234567890 lazy dogs, didn't it?",
    "  two  spaces,\ttab,\nline\r\nend   ",
    "caf\u00e9 cafe\u0301 \uff21\uff22\uff23 \u2460 \ufb01 \u00bd \u212b",
    "\u4f60\u597d \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 x_y = f(a[0]) != 3.14e-10; // <tag/>",
)


def check_pair(
    drafter: Tokenizer, expert: Tokenizer, *, drafter_vocabulary: int, expert_vocabulary: int
) -> int:
    """Return the size of the vocabulary that both models share.

    The models may have different numbers of logits, if embeddings were padded. Roles of tokens may
    differ too: an instruct model ends its text with another token than its base model.

    Args:
        drafter: The drafter's tokenizer.
        expert: The expert's tokenizer.
        drafter_vocabulary: Logits per token of the drafter.
        expert_vocabulary: Logits per token of the expert.

    Raises:
        MismatchedPair: An id means different tokens to them, or a text has different ids.
    """
    different = {id_ for id_, _ in drafter.tokens.items() ^ expert.tokens.items()}
    _check(
        "ids mean different tokens",
        [
            f"id {id_} is {_name(drafter.tokens.get(id_))} to the drafter and "
            f"{_name(expert.tokens.get(id_))} to the expert"
            for id_ in sorted(different)
        ],
    )
    special, others = drafter.special_ids, expert.special_ids
    _check(
        "tokens are special to one model only",
        [
            f"{_name(expert.tokens.get(id_))} is special to the "
            f"{'drafter' if id_ in special else 'expert'} only"
            for id_ in sorted(special ^ others)
        ],
    )
    _check("texts have different tokens", list(_by_text(drafter, expert)))
    return min(drafter_vocabulary, expert_vocabulary, expert.size)


def _check(what: str, differences: list[str]) -> None:
    if differences:
        raise MismatchedPair(
            f"Drafter and expert do not share a vocabulary, {what}: "
            f"{'; '.join(differences[:_MAX_DIFFERENCES])}. Serve a drafter trained with the "
            "expert's tokenizer"
        )


def _by_text(drafter: Tokenizer, expert: Tokenizer) -> Iterator[str]:
    for text in _TEXTS:
        ours = (*drafter.encode(text, add_special=False), -1)
        theirs = (*expert.encode(text, add_special=False), -1)
        for left, right in zip(ours, theirs, strict=False):
            if left != right:
                yield (
                    f"in {text[:20]!r}... the drafter reads {_name(drafter.tokens.get(left))} "
                    f"where the expert reads {_name(expert.tokens.get(right))}"
                )
                break


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    name: str  # directory or repository id
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPair:
    """What the API knows of a pair."""

    tokenizer: Tokenizer  # the expert's, limited to the shared vocabulary
    context_tokens: int | None  # prompt and completion together; None if unknown
    stop_ids: tuple[int, ...]  # end-of-text ids


def load_pair(drafter: ModelSource, expert: ModelSource) -> ModelPair:
    """Return what the two models share, by their configurations and tokenizers.

    Raises:
        MismatchedPair: They do not share a vocabulary.
        UnsupportedModel: One of them cannot be read, or its configuration is not supported.
    """
    configs: list[Any] = [
        read_config(**asdict(source)).get_text_config(decoder=True) for source in (drafter, expert)
    ]
    expert_tokenizer = tokenizer.load(**asdict(expert))
    vocabulary = check_pair(
        tokenizer.load(**asdict(drafter)),
        expert_tokenizer,
        drafter_vocabulary=configs[0].vocab_size,
        expert_vocabulary=configs[1].vocab_size,
    )
    lengths = [length for length in map(context_length, configs) if length is not None]
    return ModelPair(
        tokenizer=expert_tokenizer.narrowed(vocabulary),
        context_tokens=min(lengths, default=None),
        stop_ids=tuple(dict.fromkeys((*expert_tokenizer.stop_ids, *_stop_ids(expert)))),
    )


def _stop_ids(source: ModelSource) -> tuple[int, ...]:
    try:
        return stop_ids(
            GenerationConfig.from_pretrained(source.name, revision=source.revision or "main")
        )
    except OSError:
        return ()
