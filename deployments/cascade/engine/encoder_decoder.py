"""What only encoder-decoders have: two lengths, two caches, and tokens that begin every answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cascade.engine.kv_pool import capacity_tokens, free_bytes
from cascade.engine.settings import Path
from cascade.errors import MismatchedPair, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig

    from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
    from cascade.engine.settings import EngineSettings

UNSTATED_LENGTH = 1024  # tokens, where neither settings nor configuration say

_SOURCE = ("max_encoder_position_embeddings", "max_position_embeddings", "n_positions")
_ANSWER = ("max_decoder_position_embeddings", "max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The most tokens that a model reads and writes."""

    source: int
    answer: int  # with the tokens that begin it


def lengths(config: PreTrainedConfig, settings: EngineSettings) -> Lengths:
    """Return the lengths of an encoder-decoder on an engine.

    What a configuration says of relative positions, as those of T5, is how the model was trained:
    settings may go beyond it. Other models have embeddings of so many positions.

    Raises:
        UnsupportedModel: A setting asks for more positions than the model has.
    """
    relative = getattr(config, "relative_attention_num_buckets", None) is not None
    parts = (
        ("source_tokens", settings.source_tokens, getattr(config, "encoder", config), _SOURCE),
        ("answer_tokens", settings.answer_tokens, getattr(config, "decoder", config), _ANSWER),
    )
    found: list[int] = []
    for field, wanted, part, names in parts:
        values = (getattr(part, name, None) for name in names)
        stated = next((one for one in values if isinstance(one, int) and one > 0), None)
        if stated is not None and wanted > stated and not relative:
            raise UnsupportedModel(
                f"engine.{field} is {wanted}, but this {config.model_type} has {stated} positions; "
                f"set at most {stated}, or leave it out"
            )
        found.append(wanted or stated or UNSTATED_LENGTH)
    source, answer = found
    return Lengths(source=source, answer=answer)


def capacities(
    config: PreTrainedConfig, settings: EngineSettings, runner: EncoderDecoderRunner
) -> tuple[int, int]:
    """Return how many tokens the cache of answers holds, and that of encoded sources.

    Each takes half of the memory where the settings do not say its size in tokens.

    Args:
        config: The model's.
        settings: Of the engine.
        runner: Has run, so that the memory of a token is known.
    """
    limits = lengths(config, settings)
    free = free_bytes(runner.device, utilization=settings.gpu_memory_utilization)
    half = replace(settings, cache_bytes=(settings.cache_bytes or free) // 2)
    answers = capacity_tokens(
        half,
        device=runner.device,
        bytes_per_token=runner.pool.bytes_per_token,
        context_length=limits.answer,
    )
    sources = capacity_tokens(
        replace(half, cache_tokens=settings.source_cache_tokens),
        device=runner.device,
        bytes_per_token=runner.source_pool.bytes_per_token,
        context_length=limits.source,
    )
    return answers, sources


def check_settings(settings: EngineSettings) -> None:
    """Check that an engine's settings suit an encoder-decoder.

    Raises:
        UnsupportedModel: They do not.
    """
    if settings.path not in {Path.AUTO, Path.PADDED}:
        raise UnsupportedModel(
            f"engine.path is {settings.path.value}, which runs decoder-only models; for an "
            "encoder-decoder leave it auto, or set padded"
        )
    if settings.deterministic:
        raise UnsupportedModel(
            "engine.deterministic holds for decoder-only models: an encoder-decoder runs as a "
            "padded batch, whose logits depend on the batch; leave it out"
        )
    if settings.tensor_parallel > 1:
        raise UnsupportedModel(
            f"engine.tensor_parallel is {settings.tensor_parallel}, but an encoder-decoder runs on "
            "one device; leave it out"
        )


def start_ids(name: str, files: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the tokens that begin every answer of an encoder-decoder.

    Args:
        name: The checkpoint, for errors.
        files: What its configuration and its generation_config.json say; the last counts.

    Raises:
        UnsupportedModel: None is stated, or one depends on the request.
    """
    found: list[int] = []
    for keys in (("bos_token_id", "decoder_start_token_id"), ("forced_bos_token_id",)):
        stated = [(key, one[key]) for key in keys for one in files if one.get(key) is not None]
        if not stated:
            continue
        key, value = stated[-1]
        if not isinstance(value, int):
            raise UnsupportedModel(
                f"{key} of {name!r} is {value!r}; wanted one token id, for all requests"
            )
        found.append(value)
    if not found:
        raise UnsupportedModel(
            f"{name!r} has no decoder_start_token_id in its config.json or generation_config.json, "
            "so it is unknown how its answers begin; add it"
        )
    return tuple(found)


def check_pair(drafter: tuple[int, ...] | None, expert: tuple[int, ...] | None) -> None:
    """Check that two models can write the same answers.

    Args:
        drafter: What begins the drafter's answers; None: it is decoder-only.
        expert: The same of the expert.

    Raises:
        MismatchedPair: They cannot.
    """
    kinds = ["decoder-only" if one is None else "an encoder-decoder" for one in (drafter, expert)]
    if kinds[0] != kinds[1]:
        raise MismatchedPair(
            f"The drafter is {kinds[0]} and the expert {kinds[1]}: one continues a prompt, the "
            "other reads it apart from its answer; serve two models of one kind"
        )
    if drafter != expert:
        raise MismatchedPair(
            f"The drafter's answers begin with the token ids {list(drafter or ())} and the "
            f"expert's with {list(expert or ())} (decoder_start_token_id and forced_bos_token_id "
            "of config.json and generation_config.json); serve a drafter that begins as the "
            "expert does"
        )
