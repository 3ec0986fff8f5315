"""Sessions, blocks and verdicts as messages.

`encode_*` writes into a message that the frame already owns, so that large rows are copied once.
`decode_*` raises InvalidRequest for all that our values could not have produced.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, get_args, get_type_hints

import numpy as np
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, Predicate

from cascade.errors import InvalidRequest
from cascade.rules import Rule
from cascade.types import (
    Block,
    Bonus,
    Confidence,
    Coupling,
    DecodingParams,
    DraftStats,
    ExpertLoss,
    FinishReason,
    Mode,
    Origin,
    RowFormat,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
    TokenLogprob,
    Verdict,
    Verification,
)
from cascade.v1 import cascade_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
    from numpy.typing import NDArray


# A float32 softmax may exceed 1 by its rounding.
LARGEST_PROBABILITY = 1 + 1e-4


def whole(value: int, name: str, *, least: int = 0) -> int:
    """Return the value; raises InvalidRequest if it is below `least`."""
    if value < least:
        raise InvalidRequest(f"`{name}` is {value}; it must be at least {least}", param=name)
    return value


def finite(value: float, name: str) -> float:
    """Return the value; raises InvalidRequest if it is infinite or not a number."""
    if not math.isfinite(value):
        raise InvalidRequest(f"`{name}` is {value}; it must be finite", param=name)
    return value


def within(value: float, name: str, low: float, high: float) -> float:
    """Return the value; raises InvalidRequest unless `low` <= value <= `high`."""
    if not low <= value <= high:
        raise InvalidRequest(f"`{name}` is {value}; it must be {low} to {high}", param=name)
    return value


def probabilities(values: Sequence[float], name: str) -> tuple[float, ...]:
    """Return the values; raises InvalidRequest if one is not a probability."""
    for value in values:
        within(value, name, 0.0, LARGEST_PROBABILITY)
    return tuple(values)


def length(count: int, name: str, *allowed: int) -> None:
    """Raise InvalidRequest unless a list has one of the allowed lengths."""
    if count not in allowed:
        wanted = " or ".join(str(number) for number in sorted(set(allowed)))
        raise InvalidRequest(f"`{name}` has {count} entries; it must have {wanted}", param=name)


Member = TypeVar("Member", bound=StrEnum)


class Enumeration(Generic[Member]):
    """Turns members of a StrEnum into values of a proto enum and back."""

    def __init__(self, ours: type[Member], theirs: Any, prefix: str) -> None:
        self.name = prefix.lower()
        self._values = {member: int(theirs.Value(f"{prefix}_{member.name}")) for member in ours}
        self._members = {value: member for member, value in self._values.items()}

    @property
    def members(self) -> tuple[Member, ...]:
        """Return all members."""
        return tuple(self._values)

    def encode(self, member: Member) -> Any:
        """Return the proto's value."""
        return self._values[member]

    def decode(self, value: int) -> Member:
        """Return our member; raises InvalidRequest for a value that has none."""
        member = self._members.get(value)
        if member is None:
            raise InvalidRequest(
                f"`{self.name}` is {value}; it must be one of {sorted(self._members)}",
                param=self.name,
            )
        return member


ORIGIN = Enumeration(Origin, tokens_pb2.Origin, "ORIGIN")

COUPLING = Enumeration(Coupling, tokens_pb2.Coupling, "COUPLING")

BONUS = Enumeration(Bonus, tokens_pb2.Bonus, "BONUS")

VERIFICATION = Enumeration(Verification, tokens_pb2.Verification, "VERIFICATION")

ROW_FORMAT = Enumeration(RowFormat, tokens_pb2.RowFormat, "ROW_FORMAT")

MODE = Enumeration(Mode, cascade_pb2.Mode, "MODE")

CONFIDENCE = Enumeration(Confidence, cascade_pb2.Confidence, "CONFIDENCE")

EXPERT_LOSS = Enumeration(ExpertLoss, cascade_pb2.ExpertLoss, "EXPERT_LOSS")

FINISH_REASON = Enumeration(FinishReason, cascade_pb2.FinishReason, "FINISH_REASON")

Bound: TypeAlias = Ge | Gt | Le | Lt | Predicate


def _knobs(kind: type[Rule]) -> tuple[Field[Any], ...]:
    return tuple(knob for knob in fields(kind) if knob.name != "kind")


def _name(kind: type[Rule]) -> str:
    return next(str(knob.default) for knob in fields(kind) if knob.name == "kind")


def _bounds(metadata: Iterable[object]) -> Iterator[Bound]:
    for entry in metadata:
        if isinstance(entry, GroupedMetadata):
            yield from _bounds(entry)
        elif isinstance(entry, Ge | Gt | Le | Lt | Predicate):
            yield entry


_KINDS: dict[str, type[Rule]] = {_name(kind): kind for kind in get_args(Rule)}

_BOUNDS: dict[tuple[str, str], tuple[Bound, ...]] = {
    (name, knob): tuple(_bounds(getattr(hint, "__metadata__", ())))
    for name, kind in _KINDS.items()
    for knob, hint in get_type_hints(kind, include_extras=True).items()
}

_BETAS = {"one": tokens_pb2.LOSSY_BETA_ONE, "solved": tokens_pb2.LOSSY_BETA_SOLVED}

_BETA_NAMES: dict[int, str] = {
    tokens_pb2.LOSSY_BETA_UNSPECIFIED: "one",
    tokens_pb2.LOSSY_BETA_ONE: "one",
    tokens_pb2.LOSSY_BETA_SOLVED: "solved",
}


def encode_rule(rule: Rule, to: tokens_pb2.Rule) -> None:
    """Write the rule into the message."""
    message = getattr(to, rule.kind)
    message.SetInParent()
    for knob in _knobs(type(rule)):
        value = getattr(rule, knob.name)
        setattr(message, knob.name, _BETAS[value] if knob.name == "beta" else value)


def decode_rule(message: tokens_pb2.Rule) -> Rule:
    """Return the rule; raises InvalidRequest if a knob is missing or out of its bounds."""
    name = message.WhichOneof("kind")
    if name is None:
        raise InvalidRequest("`rule` has no kind; set exactly one", param="rule")
    kind = _KINDS[name]
    arguments = {knob.name: _argument(name, knob, getattr(message, name)) for knob in _knobs(kind)}
    return kind(**arguments)


def _argument(name: str, knob: Field[Any], message: Any) -> Any:
    if knob.name == "beta":
        return _beta(message.beta)
    if message.HasField(knob.name):
        value = getattr(message, knob.name)
        _check(value, name, knob.name)
        return value
    if knob.default is MISSING:
        raise InvalidRequest(f"`rule.{name}.{knob.name}` is missing", param="rule")
    return knob.default


def _beta(value: int) -> str:
    if value not in _BETA_NAMES:
        raise InvalidRequest(
            f"`rule.lossy.beta` is {value}; it must be LOSSY_BETA_ONE or LOSSY_BETA_SOLVED",
            param="rule",
        )
    return _BETA_NAMES[value]


def _check(value: float, name: str, knob: str) -> None:
    for bound in _BOUNDS[name, knob]:
        if not _holds(value, bound):
            raise InvalidRequest(
                f"`rule.{name}.{knob}` is {value}; it must obey {bound}", param="rule"
            )


def _holds(value: Any, bound: Bound) -> bool:
    match bound:
        case Ge(ge=low):
            return value >= low
        case Gt(gt=low):
            return value > low
        case Le(le=high):
            return value <= high
        case Lt(lt=high):
            return value < high
        case Predicate(func=holds):
            return bool(holds(value))


# The bits of a float16 that is finite and not negative are below those of infinity.
_INFINITY_BITS = 0x7C00


def encode_row(row: SparseProbs, to: tokens_pb2.Row) -> None:
    """Write the row into the message."""
    to.token_ids = row.ids.astype("<u4", copy=False).tobytes()
    to.weights = row.weights.astype("<f2", copy=False).tobytes()
    if row.unscaled is not None:
        to.unscaled_weights = row.unscaled.astype("<f2", copy=False).tobytes()


def decode_row(message: tokens_pb2.Row) -> SparseProbs:
    """Return the row, its arrays read-only; raises InvalidRequest if it is no law.

    A row without any entry is `decoding.rows.ABSENT`: at its position the drafter alone decides.
    """
    ids = _ids(message.token_ids)
    weights = _weights(message.weights, "weights")
    if weights.size and not weights.any():
        raise InvalidRequest("a row has no positive weight; a law needs one")
    if ids.size not in (0, weights.size):
        raise InvalidRequest(f"a row has {ids.size} ids and {weights.size} weights")
    if not message.HasField("unscaled_weights"):
        return SparseProbs(ids=ids, weights=weights)
    unscaled = _weights(message.unscaled_weights, "unscaled_weights")
    if unscaled.size != weights.size:
        raise InvalidRequest(f"a row has {weights.size} weights and {unscaled.size} unscaled ones")
    return SparseProbs(ids=ids, weights=weights, unscaled=unscaled)


def _ids(data: bytes) -> NDArray[np.uint32]:
    if len(data) % 4:
        raise InvalidRequest(f"`rows.token_ids` has {len(data)} bytes; an id has four")
    return np.frombuffer(data, dtype="<u4")


def _weights(data: bytes, name: str) -> NDArray[np.float16]:
    if len(data) % 2:
        raise InvalidRequest(f"`rows.{name}` has {len(data)} bytes; a float16 has two")
    bits = np.frombuffer(data, dtype="<u2")
    if bits.max(initial=0) >= _INFINITY_BITS:
        raise InvalidRequest(f"`rows.{name}` has a weight that is negative, infinite or no number")
    return bits.view("<f2")


_DEFAULT = SamplingParams()

_LONGEST_ID = 128

# No float32 softmax is further above 1 than this.
_LARGEST_LOGPROB = math.log(LARGEST_PROBABILITY)


def decode_session_id(value: str) -> SessionId:
    """Return the id; raises InvalidRequest if it is empty or too long."""
    if not 0 < len(value) <= _LONGEST_ID:
        raise InvalidRequest(
            f"`session_id` has {len(value)} characters; it must have 1 to {_LONGEST_ID}"
        )
    return SessionId(value)


def encode_session(session: Session, to: tokens_pb2.Session) -> None:
    """Write the session into the message."""
    to.session_id = session.id
    to.prompt_token_ids.extend(session.prompt)
    _encode_policy(session.policy, to.policy)
    to.token_ids.extend(session.tokens)
    to.origins.extend(ORIGIN.encode(origin) for origin in session.origins)


def decode_session(message: tokens_pb2.Session) -> Session:
    """Return the session."""
    if not message.prompt_token_ids:
        raise InvalidRequest("`prompt_token_ids` is empty; a prompt has at least one token")
    length(len(message.origins), "origins", len(message.token_ids))
    return Session(
        id=decode_session_id(message.session_id),
        prompt=tuple(message.prompt_token_ids),
        policy=_decode_policy(message.policy),
        tokens=tuple(message.token_ids),
        origins=tuple(map(ORIGIN.decode, message.origins)),
    )


def _encode_policy(policy: DecodingParams, to: tokens_pb2.Policy) -> None:
    encode_sampling(policy.sampling, to.sampling)
    encode_rule(policy.rule, to.rule)
    to.coupling = COUPLING.encode(policy.coupling)
    to.bonus = BONUS.encode(policy.bonus)
    to.verification = VERIFICATION.encode(policy.verification)
    to.row_format = ROW_FORMAT.encode(policy.rows)
    to.row_entry_count = policy.row_entries
    to.seed = policy.seed
    to.stop_token_ids.extend(policy.stop_ids)
    if policy.logprobs is not None:
        to.logprob_count = policy.logprobs


def _decode_policy(message: tokens_pb2.Policy) -> DecodingParams:
    logprobs = message.logprob_count if message.HasField("logprob_count") else None
    return DecodingParams(
        sampling=decode_sampling(message.sampling),
        rule=decode_rule(message.rule),
        coupling=COUPLING.decode(message.coupling),
        bonus=BONUS.decode(message.bonus),
        verification=VERIFICATION.decode(message.verification),
        rows=ROW_FORMAT.decode(message.row_format),
        row_entries=whole(message.row_entry_count, "row_entry_count", least=1),
        seed=whole(message.seed, "seed"),
        stop_ids=tuple(message.stop_token_ids),
        logprobs=None if logprobs is None else whole(logprobs, "logprob_count"),
    )


def encode_sampling(sampling: SamplingParams, to: tokens_pb2.Sampling) -> None:
    """Write the sampling into the message, defaults too."""
    to.temperature = sampling.temperature
    to.top_k = sampling.top_k
    to.top_p = sampling.top_p
    to.min_p = sampling.min_p
    to.repetition_penalty = sampling.repetition_penalty
    to.presence_penalty = sampling.presence_penalty
    to.frequency_penalty = sampling.frequency_penalty
    for token, bias in sampling.logit_bias:
        to.logit_biases.add(token_id=token, bias=bias)


def decode_sampling(
    message: tokens_pb2.Sampling, *, default: SamplingParams = _DEFAULT
) -> SamplingParams:
    """Return the sampling; what is absent comes from `default`."""

    def given(name: str, absent: float) -> float:
        return getattr(message, name) if message.HasField(name) else absent  # pyright: ignore[reportArgumentType] - the stubs want a literal

    sampling = SamplingParams(
        temperature=given("temperature", default.temperature),
        top_k=int(given("top_k", default.top_k)),
        top_p=given("top_p", default.top_p),
        min_p=given("min_p", default.min_p),
        repetition_penalty=given("repetition_penalty", default.repetition_penalty),
        presence_penalty=given("presence_penalty", default.presence_penalty),
        frequency_penalty=given("frequency_penalty", default.frequency_penalty),
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_biases)
        or default.logit_bias,
    )
    _check_sampling(sampling)
    return sampling


def _check_sampling(sampling: SamplingParams) -> None:
    for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        finite(getattr(sampling, name), name)
    for _, bias in sampling.logit_bias:
        finite(bias, "logit_bias")
    within(sampling.temperature, "temperature", 0.0, math.inf)
    within(sampling.min_p, "min_p", 0.0, 1.0)
    whole(sampling.top_k, "top_k")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"`top_p` is {sampling.top_p}; it must be in (0, 1]", param="top_p")
    if sampling.repetition_penalty <= 0:
        raise InvalidRequest(
            f"`repetition_penalty` is {sampling.repetition_penalty}; it must be above 0",
            param="repetition_penalty",
        )


def encode_block(block: Block, to: tokens_pb2.Block) -> None:
    """Write the block into the message."""
    to.token_ids.extend(block.tokens)
    to.likelihoods.extend(block.likelihoods)
    to.unscaled_likelihoods.extend(block.unscaled)
    for gates in block.draft_stats:
        to.gates.add(peak=gates.max_prob, favourite_token_id=gates.argmax, entropy=gates.entropy)
    for row in block.draft_probs:
        encode_row(row, to.rows.add())
    encode_logprobs(block.logprobs, to.logprobs)


def decode_block(message: tokens_pb2.Block) -> Block:
    """Return the block; lists are empty or as long as it, rows and gates maybe one longer."""
    count = len(message.token_ids)
    length(len(message.likelihoods), "likelihoods", 0, count)
    length(len(message.unscaled_likelihoods), "unscaled_likelihoods", 0, count)
    length(len(message.gates), "gates", 0, count, count + 1)
    length(len(message.rows), "rows", 0, count, count + 1)
    length(len(message.logprobs), "logprobs", 0, count)
    return Block(
        tokens=tuple(message.token_ids),
        likelihoods=probabilities(message.likelihoods, "likelihoods"),
        unscaled=probabilities(message.unscaled_likelihoods, "unscaled_likelihoods"),
        draft_stats=tuple(map(_decode_gates, message.gates)),
        draft_probs=tuple(map(decode_row, message.rows)),
        logprobs=decode_logprobs(message.logprobs),
    )


def _decode_gates(message: tokens_pb2.Gates) -> DraftStats:
    return DraftStats(
        max_prob=within(message.peak, "gates.peak", 0.0, LARGEST_PROBABILITY),
        argmax=message.favourite_token_id,
        entropy=finite(message.entropy, "gates.entropy"),
    )


def encode_verdict(verdict: Verdict, to: tokens_pb2.Verdict) -> None:
    """Write the verdict into the message."""
    to.accepted_count = verdict.accepted
    to.token_ids.extend(verdict.tokens)
    to.origins.extend(ORIGIN.encode(origin) for origin in verdict.origins)
    to.judged_count = verdict.judged
    to.deferred_count = verdict.deferred
    encode_logprobs(verdict.logprobs, to.logprobs)


def decode_verdict(message: tokens_pb2.Verdict) -> Verdict:
    """Return the verdict."""
    count = len(message.token_ids)
    length(len(message.origins), "origins", count)
    length(len(message.logprobs), "logprobs", 0, count)
    return Verdict(
        accepted=whole(message.accepted_count, "accepted_count"),
        tokens=tuple(message.token_ids),
        origins=tuple(map(ORIGIN.decode, message.origins)),
        judged=whole(message.judged_count, "judged_count"),
        deferred=whole(message.deferred_count, "deferred_count"),
        logprobs=decode_logprobs(message.logprobs),
    )


def encode_logprobs(
    logprobs: Iterable[TokenLogprob],
    to: RepeatedCompositeFieldContainer[tokens_pb2.TokenLogprob],
) -> None:
    """Append the log-probabilities to the repeated field."""
    for entry in logprobs:
        to.add(
            token_id=entry.token,
            logprob=entry.logprob,
            top_token_ids=[token for token, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
        )


def decode_logprobs(messages: Iterable[tokens_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities."""
    return tuple(map(_decode_logprob, messages))


def _decode_logprob(message: tokens_pb2.TokenLogprob) -> TokenLogprob:
    length(len(message.top_logprobs), "top_logprobs", len(message.top_token_ids))
    for value in (message.logprob, *message.top_logprobs):
        within(value, "logprob", -math.inf, _LARGEST_LOGPROB)
    return TokenLogprob(
        token=message.token_id,
        logprob=message.logprob,
        top=tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)),
    )
