"""What is known of a model without its weights: enough for the doors and to check a pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cascade.engine import tokenizer
from cascade.engine.model_loader import check_kind, check_state, context_length
from cascade.errors import MismatchedPair, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cascade.engine.tokenizer import Tokenizer

_NAMED = 5

# Case, composed and decomposed accents, widths, spaces, digits, scripts and joined emoji: where
# normalisers and pre-tokenisers part ways.
_PROBES = (
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
    """Return the vocabulary both models share: logits from there on are no tokens of the pair.

    Models may have different numbers of logits, where embeddings were padded. Roles of tokens may
    differ too (an instruct model ends its answers with another token than its base model does).

    Args:
        drafter: the drafter's tokenizer.
        expert: the expert's tokenizer.
        drafter_vocabulary: columns of the drafter's logits.
        expert_vocabulary: columns of the expert's logits.

    Raises:
        MismatchedPair: if an id means different things to them, or texts fall into different ids.
    """
    _refuse(_by_id(drafter, expert), "ids mean different tokens")
    _refuse(_by_speciality(drafter, expert), "tokens are special to one alone")
    _refuse(_by_text(drafter, expert), "texts fall into different tokens")
    return min(drafter_vocabulary, expert_vocabulary, expert.size)


def _by_id(drafter: Tokenizer, expert: Tokenizer) -> Iterable[str]:
    for id_ in sorted(drafter.tokens.keys() | expert.tokens.keys()):
        ours, theirs = drafter.tokens.get(id_), expert.tokens.get(id_)
        if ours != theirs:
            yield f"id {id_} is {_name(ours)} to the drafter and {_name(theirs)} to the expert"


def _by_speciality(drafter: Tokenizer, expert: Tokenizer) -> Iterable[str]:
    ours, theirs = drafter.special_ids, expert.special_ids
    for id_ in sorted(ours ^ theirs):
        holder = "drafter" if id_ in ours else "expert"
        yield f"{_name(expert.tokens.get(id_))} is special to the {holder} alone"


def _by_text(drafter: Tokenizer, expert: Tokenizer) -> Iterable[str]:
    for text in _PROBES:
        ours = drafter.encode(text, add_special=False)
        theirs = expert.encode(text, add_special=False)
        for left, right in zip((*ours, -1), (*theirs, -1), strict=False):
            if left != right:
                yield (
                    f"in {text[:20]!r}... the drafter reads {_name(drafter.tokens.get(left))} "
                    f"where the expert reads {_name(expert.tokens.get(right))}"
                )
                break


def _refuse(differences: Iterable[str], what: str) -> None:
    named = list(islice(differences, _NAMED))
    if named:
        raise MismatchedPair(
            f"Drafter and expert do not share a vocabulary, {what}: {'; '.join(named)}. Serve a "
            "drafter trained with the expert's tokenizer"
        )


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
    """A pair as its doors see it."""

    tokenizer: Tokenizer  # of the expert, narrowed to what both models know
    context_tokens: int | None  # of prompt and answer together; None: no bound is known
    stop_ids: tuple[int, ...]  # that end an answer


def load_pair(drafter: ModelSource, expert: ModelSource) -> ModelPair:
    """Return what the two models share; reads configurations and tokenizers alone.

    Raises:
        MismatchedPair: They do not share a vocabulary.
        UnsupportedModel: One of them cannot be read, or cannot be served as far as that tells.
    """
    left, right = _config(drafter), _config(expert)
    words = _tokenizer(expert)
    vocabulary = check_pair(
        _tokenizer(drafter),
        words,
        drafter_vocabulary=left.vocab_size,
        expert_vocabulary=right.vocab_size,
    )
    lengths = [length for length in map(context_length, (left, right)) if length is not None]
    return ModelPair(
        tokenizer=words.narrowed(vocabulary),
        context_tokens=min(lengths, default=None),
        stop_ids=tuple(dict.fromkeys((*words.stop_ids, *_stop_ids(expert)))),
    )


def _tokenizer(source: ModelSource) -> Tokenizer:
    return tokenizer.load(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
    )


def _config(source: ModelSource) -> Any:
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


def _stop_ids(source: ModelSource) -> tuple[int, ...]:
    try:
        stated: Any = GenerationConfig.from_pretrained(
            source.name, revision=source.revision or "main"
        ).eos_token_id
    except OSError:
        return ()
    if stated is None:
        return ()
    return tuple(stated) if isinstance(stated, list) else (int(stated),)
