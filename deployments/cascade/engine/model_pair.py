"""Check that two models can form a cascade, by their configurations and tokenizers alone.

`vocabulary` says how their tokens correspond. The API also takes the tokenizer and the limits of
the pair from here.
"""

from __future__ import annotations

import filecmp
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cascade.engine import encoder_decoder, tokenizer
from cascade.engine.model_loader import context_length, find_file, read_config, read_json
from cascade.engine.settings import VocabularyWay
from cascade.engine.vocabulary import map_vocabularies
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cascade.engine.settings import ExpertVocabulary
    from cascade.engine.tokenizer import Tokenizer
    from cascade.engine.vocabulary import VocabularyMap

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
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


def map_to_expert(expert: ExpertVocabulary, drafter: Tokenizer, drafter_size: int) -> VocabularyMap:
    """Return how a drafter's tokens are said in its expert's.

    Args:
        expert: Where the expert comes from.
        drafter: The drafter's tokenizer.
        drafter_size: Logits per token of the drafter.

    Raises:
        MismatchedPair: They share too little.
        UnsupportedModel: The expert's configuration or tokenizer cannot be read.
    """
    source = ModelSource(
        name=expert.model, revision=expert.revision, trust_remote_code=expert.trust_remote_code
    )
    return map_vocabularies(
        drafter,
        tokenizer.load(**asdict(source)),
        drafter_size=drafter_size,
        expert_size=_text_config(source).vocab_size,
        way=expert.way,
    )


def _text_config(source: ModelSource) -> Any:
    return read_config(**asdict(source)).get_text_config(decoder=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    name: str  # directory or repository id
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPair:
    """What the API knows of a pair."""

    tokenizer: Tokenizer  # the expert's, limited to the tokens that it has logits for
    vocabulary: VocabularyMap  # how the drafter's tokens are said in the expert's
    context_tokens: int | None  # of the expert: prompt and completion together; None if unknown
    drafter_context_tokens: int | None
    stop_ids: tuple[int, ...]  # end-of-text ids
    generation: GenerationDefaults
    start_ids: tuple[int, ...] = ()  # begin every answer of encoder-decoders; none: decoder-only
    source_tokens: int | None = None  # most tokens of a prompt that the expert's encoder reads


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the expert's generation_config.json says about requests that do not say it."""

    sampling: Mapping[str, float] = field(default_factory=dict[str, float])  # see `_SAMPLING`
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that no text has


def load_pair(
    drafter: ModelSource,
    expert: ModelSource,
    *,
    generation_config: bool = True,
    way: VocabularyWay = VocabularyWay.AUTO,
) -> ModelPair:
    """Return what the two models share, by their configurations and tokenizers.

    Args:
        drafter: Where the drafter comes from.
        expert: Where the expert comes from.
        generation_config: Read defaults of requests from the expert's generation_config.json.
        way: How the drafter's tokens are said in the expert's.

    Raises:
        MismatchedPair: Their vocabularies share too little.
        UnsupportedModel: One of them cannot be read, or its configuration is not supported.
    """
    configs = [_text_config(source) for source in (drafter, expert)]
    starts = _start_ids(drafter), _start_ids(expert)
    encoder_decoder.check_pair(*starts)
    expert_tokenizer = tokenizer.load(**asdict(expert))
    config, generation = (
        read_json(expert.name, file, revision=expert.revision) or {}
        for file in ("config.json", "generation_config.json")
    )
    text: Any = config.get("text_config")
    files = (config, text if isinstance(text, dict) else {}, generation)
    same = configs[0].model_type == configs[1].model_type and _same_tokenizer(drafter, expert)
    vocabulary = map_vocabularies(
        expert_tokenizer if same else tokenizer.load(**asdict(drafter)),
        expert_tokenizer,
        drafter_size=configs[0].vocab_size,
        expert_size=configs[1].vocab_size,
        way=way,
    )
    if not vocabulary.identical:
        log.warning("%s", vocabulary.summary)
    elif not vocabulary.reads_alike:
        log.warning(
            "the drafter's tokenizer reads texts as other tokens than the expert's, so the drafter "
            "sees texts as it was not trained to; expect fewer accepted drafts"
        )
    stated = dict(generation) if generation_config else {}
    if starts[1] is not None:
        stated.pop("forced_bos_token_id", None)  # answers begin with it
    return ModelPair(
        tokenizer=expert_tokenizer.narrowed(vocabulary.size),
        vocabulary=vocabulary,
        context_tokens=context_length(configs[1]),
        drafter_context_tokens=context_length(configs[0]),
        stop_ids=tuple(dict.fromkeys((*expert_tokenizer.stop_ids, *_end_ids(expert, files)))),
        generation=generation_defaults(expert.name, stated),
        start_ids=starts[1] or (),
    )


def _same_tokenizer(drafter: ModelSource, expert: ModelSource) -> bool:
    """Return whether two models have the same files of a tokenizer, so that one is read for both.

    One of 262,144 tokens takes a second or two to read, and 200 MB.
    """
    if drafter.trust_remote_code or expert.trust_remote_code:
        return False
    found = [
        [find_file(source.name, file, revision=source.revision) for file in _TOKENIZER_FILES]
        for source in (drafter, expert)
    ]
    pairs = zip(*found, strict=True)
    return found[0][0] is not None and all(
        one == other if one is None or other is None else filecmp.cmp(one, other, shallow=False)
        for one, other in pairs
    )


def _start_ids(source: ModelSource) -> tuple[int, ...] | None:
    """Return the tokens that begin every answer, None for a decoder-only model."""
    config = read_config(**asdict(source))
    if not config.is_encoder_decoder:
        return None
    generation = read_json(source.name, "generation_config.json", revision=source.revision)
    return encoder_decoder.start_ids(source.name, [config.to_dict(), generation or {}])


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
