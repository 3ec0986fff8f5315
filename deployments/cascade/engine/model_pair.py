"""Check that two models can form a cascade, by their configurations and tokenizers alone.

Both must share a vocabulary. The API also takes the tokenizer and the limits of the pair from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cascade.engine import tokenizer
from cascade.engine.model_loader import context_length, read_config, read_json
from cascade.errors import MismatchedPair, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cascade.engine.tokenizer import Tokenizer

_MAX_DIFFERENCES = 5  # in a message

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")

# Settings of `generate` that change a text and that no request can ask for, by their neutral value
# besides None, False, 0 and nothing.
_NEUTRAL = {
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": (),
    "stop_strings": (),
    "top_h": 1,
    "typical_p": 1,
    "watermarking_config": (),
}

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
    context_tokens: int | None  # of the expert: prompt and completion together; None if unknown
    drafter_context_tokens: int | None
    stop_ids: tuple[int, ...]  # end-of-text ids
    generation: GenerationDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the expert's generation_config.json says about requests that do not say it."""

    sampling: Mapping[str, float] = field(default_factory=dict[str, float])  # see `_SAMPLING`
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that no text has


def load_pair(
    drafter: ModelSource, expert: ModelSource, *, generation_config: bool = True
) -> ModelPair:
    """Return what the two models share, by their configurations and tokenizers.

    Args:
        drafter: Where the drafter comes from.
        expert: Where the expert comes from.
        generation_config: Read defaults of requests from the expert's generation_config.json.

    Raises:
        MismatchedPair: They do not share a vocabulary.
        UnsupportedModel: One of them cannot be read, or its configuration is not supported.
    """
    configs: list[Any] = [
        read_config(**asdict(source)).get_text_config(decoder=True) for source in (drafter, expert)
    ]
    expert_tokenizer = tokenizer.load(**asdict(expert))
    config, generation = (
        read_json(expert.name, file, revision=expert.revision) or {}
        for file in ("config.json", "generation_config.json")
    )
    text: Any = config.get("text_config")
    files = (config, text if isinstance(text, dict) else {}, generation)
    vocabulary = check_pair(
        tokenizer.load(**asdict(drafter)),
        expert_tokenizer,
        drafter_vocabulary=configs[0].vocab_size,
        expert_vocabulary=configs[1].vocab_size,
    )
    return ModelPair(
        tokenizer=expert_tokenizer.narrowed(vocabulary),
        context_tokens=context_length(configs[1]),
        drafter_context_tokens=context_length(configs[0]),
        stop_ids=tuple(dict.fromkeys((*expert_tokenizer.stop_ids, *_end_ids(expert, files)))),
        generation=generation_defaults(expert.name, generation if generation_config else {}),
    )


def _end_ids(source: ModelSource, files: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the end-of-text ids that the files of a checkpoint name."""
    for stated in files:
        ids: Any = stated.get("eos_token_id")
        for id_ in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not isinstance(id_, int):
                raise UnsupportedModel(
                    f"An eos_token_id of {source.name!r} is {id_!r}; wanted token ids"
                )
            if id_ >= 0:
                yield id_


def generation_defaults(name: str, stated: Mapping[str, Any]) -> GenerationDefaults:
    """Return the defaults of requests that a generation_config.json states.

    Args:
        name: The checkpoint, for errors.
        stated: What the file says.

    Raises:
        UnsupportedModel: It asks for something that this server cannot do.
    """
    advice = "remove it there, or set `defaults.generation_config: off` to ignore the file"
    for key, neutral in _NEUTRAL.items():
        if stated.get(key) and stated[key] != neutral:
            raise UnsupportedModel(
                f"generation_config.json of {name!r} sets {key} to {stated[key]!r}, which this "
                f"server does not support; {advice}"
            )
    words: list[Any] = [[id_] for id_ in stated.get("suppress_tokens") or ()]
    words += stated.get("bad_words_ids") or ()
    if not all(
        isinstance(word, list) and word and all(isinstance(id_, int) and id_ >= 0 for id_ in word)  # pyright: ignore[reportUnknownVariableType] - JSON
        for word in words
    ):
        raise UnsupportedModel(
            f"generation_config.json of {name!r} bans {words!r}; wanted lists of token ids; "
            f"{advice}"
        )
    return GenerationDefaults(
        sampling={key: stated[key] for key in _SAMPLING if stated.get(key) is not None},
        bad_words=tuple(dict.fromkeys(tuple(word) for word in words)),
    )
