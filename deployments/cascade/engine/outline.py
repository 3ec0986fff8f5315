"""What is known of a model without its weights: enough for the doors and to check a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cascade.engine import pair, tokenizer
from cascade.engine.context import context_length
from cascade.engine.weights import check_kind, check_state
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from cascade.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from."""

    name: str  # directory or repository id
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A pair as its doors see it."""

    tokenizer: Tokenizer  # of the expert, narrowed to what both models know
    context_tokens: int | None  # of prompt and answer together; None: no bound is known
    stop_ids: tuple[int, ...]  # that end an answer


def of_pair(drafter: Source, expert: Source) -> Outline:
    """Return what the two models share; reads configurations and tokenizers alone.

    Raises:
        MismatchedPair: They do not share a vocabulary.
        UnsupportedModel: One of them cannot be read, or cannot be served as far as that tells.
    """
    left, right = _config(drafter), _config(expert)
    words = _tokenizer(expert)
    vocabulary = pair.check_pair(
        _tokenizer(drafter),
        words,
        drafter_vocabulary=left.vocab_size,
        expert_vocabulary=right.vocab_size,
    )
    lengths = [length for length in map(context_length, (left, right)) if length is not None]
    return Outline(
        tokenizer=words.narrowed(vocabulary),
        context_tokens=min(lengths, default=None),
        stop_ids=tuple(dict.fromkeys((*words.stop_ids, *_stop_ids(expert)))),
    )


def _tokenizer(source: Source) -> Tokenizer:
    return tokenizer.load(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
    )


def _config(source: Source) -> Any:
    try:
        found = AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"No model at {source.name!r} whose configuration can be read: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    check_kind(source.name, found)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(found), None)
    check_state(kind)
    return found.get_text_config(decoder=True)


def _stop_ids(source: Source) -> tuple[int, ...]:
    try:
        stated: Any = GenerationConfig.from_pretrained(
            source.name, revision=source.revision or "main"
        ).eos_token_id
    except OSError:
        return ()
    if stated is None:
        return ()
    return tuple(stated) if isinstance(stated, list) else (int(stated),)
