"""Conversions between our values and the protos, with the checks that a peer's bytes need.

`encode_*` writes into a proto message that the frame already owns, so that large distributions are
copied once. `decode_*` raises InvalidRequest for everything that our encoders cannot have written.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from cascade.errors import InvalidRequest
from cascade.rules import Rule
from cascade.types import (
    Block,
    Bonus,
    Confidence,
    Coupling,
    DecodingParams,
    DrafterLoss,
    DraftStats,
    ExpertLoss,
    FinishReason,
    Grammar,
    GrammarKind,
    Mode,
    Origin,
    Phase,
    PhaseRules,
    PhaseSwitch,
    RowFormat,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
    TokenConstraints,
    TokenLogprob,
    Verdict,
    Verification,
)
from cascade.v1 import cascade_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sized

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
    from numpy.typing import NDArray

Member = TypeVar("Member", bound=StrEnum)
Number = TypeVar("Number", int, float)

# Rounding can lift a float32 softmax this far above 1.
_MAX_PROBABILITY = 1 + 1e-4
_MAX_LOGPROB = math.log(_MAX_PROBABILITY)

# Bit patterns of finite, non-negative float16 numbers are below that of infinity.
_FLOAT16_INFINITY = 0x7C00

_MAX_ID_LENGTH = 128
_UNKNOWN = -1.0  # a divergence
_MAX_BIAS = 1e30  # of a logit, which is a float32

SAMPLING_FIELDS = tuple(name for name in SamplingParams.__slots__ if name != "logit_bias")

_RULE: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="kind")])
_BETA_VALUES = {"one": tokens_pb2.LOSSY_BETA_ONE, "solved": tokens_pb2.LOSSY_BETA_SOLVED}
_BETA_NAMES = {value: name for name, value in _BETA_VALUES.items()}


def bounded(value: Number, name: str, low: float = 0, high: float = math.inf) -> Number:
    """Return the value.

    Args:
        value: A number that a peer sent.
        name: The proto field, for the error.
        low: The least value allowed.
        high: The largest value allowed.

    Raises:
        InvalidRequest: The value is out of bounds, or not a number.
    """
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InvalidRequest(f"`{name}` is {value}; it must be {wanted}", param=name)
    return value


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise InvalidRequest(f"`{name}` is {value}; it must be finite", param=name)
    return value


def _probabilities(values: Iterable[float], name: str) -> tuple[float, ...]:
    return tuple(bounded(value, name, 0.0, _MAX_PROBABILITY) for value in values)


def _check_length(values: Sized, name: str, *allowed: int) -> None:
    if len(values) not in allowed:
        wanted = " or ".join(str(number) for number in sorted(set(allowed)))
        raise InvalidRequest(
            f"`{name}` has {len(values)} entries; it must have {wanted}", param=name
        )


class EnumCodec(Generic[Member]):
    """Maps the members of a StrEnum to the values of a proto enum and back.

    `Coupling.GUMBEL` is `COUPLING_GUMBEL`; no member is `COUPLING_UNSPECIFIED`.
    """

    def __init__(self, members: type[Member], proto: Any) -> None:
        prefix = proto.keys()[0].removesuffix("UNSPECIFIED")
        self.name = prefix.rstrip("_").lower()
        self.values = {member: int(proto.Value(prefix + member.name)) for member in members}
        self._members = {value: member for member, value in self.values.items()}

    def encode(self, member: Member) -> Any:
        """Return the proto's value."""
        return self.values[member]

    def decode(self, value: int) -> Member:
        """Return the member; raises InvalidRequest for a value that has none."""
        member = self._members.get(value)
        if member is None:
            wanted = f"it must be one of {sorted(self._members)}"
            raise InvalidRequest(f"`{self.name}` is {value}; {wanted}", param=self.name)
        return member


ORIGIN = EnumCodec(Origin, tokens_pb2.Origin)
GRAMMAR_KIND = EnumCodec(GrammarKind, tokens_pb2.GrammarKind)
PHASE = EnumCodec(Phase, tokens_pb2.Phase)
COUPLING = EnumCodec(Coupling, tokens_pb2.Coupling)
BONUS = EnumCodec(Bonus, tokens_pb2.Bonus)
VERIFICATION = EnumCodec(Verification, tokens_pb2.Verification)
ROW_FORMAT = EnumCodec(RowFormat, tokens_pb2.RowFormat)
MODE = EnumCodec(Mode, cascade_pb2.Mode)
CONFIDENCE = EnumCodec(Confidence, cascade_pb2.Confidence)
EXPERT_LOSS = EnumCodec(ExpertLoss, cascade_pb2.ExpertLoss)
DRAFTER_LOSS = EnumCodec(DrafterLoss, cascade_pb2.DrafterLoss)
FINISH_REASON = EnumCodec(FinishReason, cascade_pb2.FinishReason)


def encode_rule(rule: Rule, proto: tokens_pb2.Rule) -> None:
    """Write the rule into the proto."""
    parameters = asdict(rule)
    message = getattr(proto, parameters.pop("kind"))
    message.SetInParent()
    for name, value in parameters.items():
        setattr(message, name, _BETA_VALUES[value] if name == "beta" else value)


def decode_rule(proto: tokens_pb2.Rule) -> Rule:
    """Return the rule; raises InvalidRequest if a parameter is missing or out of its bounds."""
    kind = proto.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("`rule` has no kind; set exactly one", param="rule")
    parameters = {field.name: value for field, value in getattr(proto, kind).ListFields()}
    if "beta" in parameters:
        parameters["beta"] = _BETA_NAMES.get(parameters["beta"], parameters["beta"])
    try:
        return _RULE.validate_python({"kind": kind, **parameters})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        *_, name = problem["loc"]
        got = parameters.get(str(name), "missing")
        param = f"rule.{kind}.{name}"
        raise InvalidRequest(f"`{param}` is {got}: {problem['msg']}", param=param) from None


def encode_sampling(sampling: SamplingParams, proto: tokens_pb2.Sampling) -> None:
    """Write the sampling parameters into the proto, defaults too."""
    for name in SAMPLING_FIELDS:
        setattr(proto, name, getattr(sampling, name))
    for token, bias in sampling.logit_bias:
        proto.logit_biases.add(token_id=token, bias=bias)


def decode_sampling(proto: tokens_pb2.Sampling) -> SamplingParams:
    """Return the sampling parameters; absent ones have their defaults."""
    fields: dict[str, Any] = {field.name: value for field, value in proto.ListFields()}
    fields.pop("logit_biases", None)
    biases = (
        (entry.token_id, bounded(entry.bias, "logit_bias", -_MAX_BIAS, _MAX_BIAS))
        for entry in proto.logit_biases
    )
    sampling = SamplingParams(**fields, logit_bias=tuple(biases))
    _finite(sampling.temperature, "temperature")
    bounded(sampling.temperature, "temperature")
    bounded(sampling.repetition_penalty, "repetition_penalty", 1e-6, _MAX_BIAS)
    for name in ("presence_penalty", "frequency_penalty"):
        bounded(getattr(sampling, name), name, -_MAX_BIAS, _MAX_BIAS)
    bounded(sampling.top_k, "top_k")
    bounded(sampling.min_p, "min_p", 0.0, 1.0)
    bounded(sampling.top_p, "top_p", 0.0, 1.0)
    if sampling.top_p <= 0:
        raise InvalidRequest(f"`top_p` is {sampling.top_p}; it must be above 0", param="top_p")
    return sampling


def decode_session_id(value: str) -> SessionId:
    """Return the id; raises InvalidRequest if it is empty or too long."""
    if not 0 < len(value) <= _MAX_ID_LENGTH:
        raise InvalidRequest(
            f"`session_id` has {len(value)} characters; it must have 1 to {_MAX_ID_LENGTH}"
        )
    return SessionId(value)


def encode_session(session: Session, proto: tokens_pb2.Session) -> None:
    """Write the session into the proto."""
    proto.session_id = session.id
    proto.prompt_token_ids.extend(session.prompt)
    _encode_policy(session.policy, proto.policy)
    proto.token_ids.extend(session.tokens)
    proto.origins.extend(map(ORIGIN.encode, session.origins))


def decode_session(proto: tokens_pb2.Session) -> Session:
    """Return the session."""
    if not proto.prompt_token_ids:
        raise InvalidRequest("`prompt_token_ids` is empty; a prompt has at least one token")
    _check_length(proto.origins, "origins", len(proto.token_ids))
    return Session(
        id=decode_session_id(proto.session_id),
        prompt=tuple(proto.prompt_token_ids),
        policy=_decode_policy(proto.policy),
        tokens=tuple(proto.token_ids),
        origins=tuple(map(ORIGIN.decode, proto.origins)),
    )


def _encode_policy(policy: DecodingParams, proto: tokens_pb2.Policy) -> None:
    encode_sampling(policy.sampling, proto.sampling)
    _encode_constraints(policy.constraints, proto.constraints)
    if policy.grammar is not None:
        proto.grammar.kind = GRAMMAR_KIND.encode(policy.grammar.kind)
        proto.grammar.text = policy.grammar.text
    encode_rule(policy.rule, proto.rule)
    if policy.phases is not None:
        _encode_phases(policy.phases, proto.phases)
    proto.coupling = COUPLING.encode(policy.coupling)
    proto.bonus = BONUS.encode(policy.bonus)
    proto.verification = VERIFICATION.encode(policy.verification)
    proto.row_format = ROW_FORMAT.encode(policy.rows)
    proto.row_entry_count = policy.row_entries
    proto.seed = policy.seed
    proto.stop_token_ids.extend(policy.stop_ids)
    if policy.logprobs is not None:
        proto.logprob_count = policy.logprobs
    if policy.divergence_budget is not None:
        proto.divergence_budget = policy.divergence_budget


def _decode_policy(proto: tokens_pb2.Policy) -> DecodingParams:
    logprobs = proto.logprob_count if proto.HasField("logprob_count") else None
    return DecodingParams(
        sampling=decode_sampling(proto.sampling),
        constraints=_decode_constraints(proto.constraints),
        grammar=decode_grammar(proto.grammar) if proto.HasField("grammar") else None,
        rule=decode_rule(proto.rule),
        phases=_decode_phases(proto.phases) if proto.HasField("phases") else None,
        coupling=COUPLING.decode(proto.coupling),
        bonus=BONUS.decode(proto.bonus),
        verification=VERIFICATION.decode(proto.verification),
        rows=ROW_FORMAT.decode(proto.row_format),
        row_entries=bounded(proto.row_entry_count, "row_entry_count", 1),
        seed=bounded(proto.seed, "seed"),
        stop_ids=tuple(proto.stop_token_ids),
        logprobs=None if logprobs is None else bounded(logprobs, "logprob_count"),
        divergence_budget=decode_divergence(proto, "divergence_budget"),
    )


def decode_divergence(proto: Any, name: str) -> float | None:
    """Return an optional field that is a divergence; raises InvalidRequest if it is none."""
    return bounded(getattr(proto, name), name) if proto.HasField(name) else None


def _encode_phases(phases: PhaseRules, proto: tokens_pb2.PhaseRules) -> None:
    proto.start = PHASE.encode(phases.start)
    for switch in phases.switches:
        proto.switches.add(
            phase=PHASE.encode(switch.phase),
            token_ids=switch.tokens,
            next=PHASE.encode(switch.next),
        )
    for phase, rule in phases.rules:
        message = proto.rules.add(phase=PHASE.encode(phase))
        encode_rule(rule, message.rule)
    if phases.thinking_tokens is not None:
        proto.thinking_token_budget = phases.thinking_tokens


def _decode_phases(proto: tokens_pb2.PhaseRules) -> PhaseRules:
    switches = tuple(
        PhaseSwitch(
            phase=PHASE.decode(one.phase), tokens=tuple(one.token_ids), next=PHASE.decode(one.next)
        )
        for one in proto.switches
    )
    if not all(one.tokens for one in switches):
        raise InvalidRequest("a switch of `phases` has no tokens; it has at least one")
    budget = proto.thinking_token_budget if proto.HasField("thinking_token_budget") else None
    if budget is not None and all(one.phase is not Phase.THINKING for one in switches):
        raise InvalidRequest("`thinking_token_budget` needs a switch that ends thoughts; add one")
    return PhaseRules(
        start=PHASE.decode(proto.start),
        switches=switches,
        rules=tuple((PHASE.decode(one.phase), decode_rule(one.rule)) for one in proto.rules),
        thinking_tokens=None if budget is None else bounded(budget, "thinking_token_budget"),
    )


def _encode_constraints(constraints: TokenConstraints, proto: tokens_pb2.TokenConstraints) -> None:
    proto.min_token_count = constraints.min_tokens
    for word in constraints.bad_words:
        proto.bad_words.add(token_ids=word)
    proto.allowed_token_ids.extend(constraints.allowed_ids)


def _decode_constraints(proto: tokens_pb2.TokenConstraints) -> TokenConstraints:
    words = tuple(tuple(word.token_ids) for word in proto.bad_words)
    if not all(words):
        raise InvalidRequest("`bad_words` has an empty one; a bad word has at least one token")
    return TokenConstraints(
        min_tokens=bounded(proto.min_token_count, "min_token_count"),
        bad_words=words,
        allowed_ids=tuple(proto.allowed_token_ids),
    )


def decode_grammar(proto: tokens_pb2.Grammar) -> Grammar:
    """Return the grammar."""
    return Grammar(kind=GRAMMAR_KIND.decode(proto.kind), text=proto.text)


def encode_block(block: Block, proto: tokens_pb2.Block) -> None:
    """Write the block into the proto."""
    proto.token_ids.extend(block.tokens)
    proto.likelihoods.extend(block.likelihoods)
    proto.unscaled_likelihoods.extend(block.unscaled)
    for stats in block.draft_stats:
        proto.gates.add(peak=stats.max_prob, favourite_token_id=stats.argmax, entropy=stats.entropy)
    for probs in block.draft_probs:
        _encode_probs(probs, proto.rows.add())
    encode_logprobs(block.logprobs, proto.logprobs)
    proto.forced.extend(block.forced)


def decode_block(proto: tokens_pb2.Block) -> Block:
    """Return the block; its lists are empty or of its length, `rows` and `gates` maybe one more."""
    count = len(proto.token_ids)
    _check_length(proto.likelihoods, "likelihoods", 0, count)
    _check_length(proto.unscaled_likelihoods, "unscaled_likelihoods", 0, count)
    _check_length(proto.gates, "gates", 0, count, count + 1)
    _check_length(proto.rows, "rows", 0, count, count + 1)
    _check_length(proto.logprobs, "logprobs", 0, count)
    _check_length(proto.forced, "forced", 0, count)
    return Block(
        tokens=tuple(proto.token_ids),
        likelihoods=_probabilities(proto.likelihoods, "likelihoods"),
        unscaled=_probabilities(proto.unscaled_likelihoods, "unscaled_likelihoods"),
        draft_stats=tuple(map(_decode_stats, proto.gates)),
        draft_probs=tuple(map(_decode_probs, proto.rows)),
        logprobs=decode_logprobs(proto.logprobs),
        forced=tuple(proto.forced),
    )


def _decode_stats(proto: tokens_pb2.Gates) -> DraftStats:
    return DraftStats(
        max_prob=bounded(proto.peak, "gates.peak", 0.0, _MAX_PROBABILITY),
        argmax=proto.favourite_token_id,
        entropy=_finite(proto.entropy, "gates.entropy"),
    )


def _encode_probs(probs: SparseProbs, proto: tokens_pb2.Row) -> None:
    proto.token_ids = probs.ids.astype("<u4", copy=False).tobytes()
    proto.weights = probs.weights.astype("<f2", copy=False).tobytes()
    if probs.unscaled is not None:
        proto.unscaled_weights = probs.unscaled.astype("<f2", copy=False).tobytes()


def _decode_probs(proto: tokens_pb2.Row) -> SparseProbs:
    """Return the distribution with read-only arrays; one without entries tells nothing."""
    if len(proto.token_ids) % 4:
        raise InvalidRequest(f"`rows.token_ids` has {len(proto.token_ids)} bytes; an id has four")
    ids = np.frombuffer(proto.token_ids, dtype="<u4")
    weights = _decode_weights(proto.weights, "weights")
    if weights.size and not weights.any():
        raise InvalidRequest("a row has no positive weight; a distribution needs one")
    if ids.size not in (0, weights.size):
        raise InvalidRequest(f"a row has {ids.size} ids and {weights.size} weights")
    unscaled = None
    if proto.HasField("unscaled_weights"):
        unscaled = _decode_weights(proto.unscaled_weights, "unscaled_weights")
        if unscaled.size != weights.size:
            raise InvalidRequest(
                f"a row has {weights.size} weights and {unscaled.size} unscaled weights"
            )
    return SparseProbs(ids=ids, weights=weights, unscaled=unscaled)


def _decode_weights(data: bytes, name: str) -> NDArray[np.float16]:
    if len(data) % 2:
        raise InvalidRequest(f"`rows.{name}` has {len(data)} bytes; a float16 has two")
    bits = np.frombuffer(data, dtype="<u2")
    if bits.max(initial=0) >= _FLOAT16_INFINITY:
        raise InvalidRequest(f"`rows.{name}` has a weight that is negative, infinite or no number")
    return bits.view("<f2")


def encode_verdict(verdict: Verdict, proto: tokens_pb2.Verdict) -> None:
    """Write the verdict into the proto."""
    proto.accepted_count = verdict.accepted
    proto.token_ids.extend(verdict.tokens)
    proto.origins.extend(map(ORIGIN.encode, verdict.origins))
    proto.judged_count = verdict.judged
    proto.deferred_count = verdict.deferred
    encode_logprobs(verdict.logprobs, proto.logprobs)
    proto.divergences.extend(_UNKNOWN if one is None else one for one in verdict.divergences)
    if verdict.divergence_left is not None:
        proto.divergence_left = verdict.divergence_left


def decode_verdict(proto: tokens_pb2.Verdict) -> Verdict:
    """Return the verdict."""
    count = len(proto.token_ids)
    _check_length(proto.origins, "origins", count)
    _check_length(proto.logprobs, "logprobs", 0, count)
    _check_length(proto.divergences, "divergences", 0, count)
    return Verdict(
        accepted=bounded(proto.accepted_count, "accepted_count"),
        tokens=tuple(proto.token_ids),
        origins=tuple(map(ORIGIN.decode, proto.origins)),
        judged=bounded(proto.judged_count, "judged_count"),
        deferred=bounded(proto.deferred_count, "deferred_count"),
        logprobs=decode_logprobs(proto.logprobs),
        divergences=tuple(
            None if one == _UNKNOWN else bounded(one, "divergences", 0.0, _MAX_PROBABILITY)
            for one in proto.divergences
        ),
        divergence_left=decode_divergence(proto, "divergence_left"),
    )


def encode_logprobs(
    logprobs: Iterable[TokenLogprob],
    protos: RepeatedCompositeFieldContainer[tokens_pb2.TokenLogprob],
) -> None:
    """Append the log-probabilities to the repeated field."""
    for entry in logprobs:
        protos.add(
            token_id=entry.token,
            logprob=entry.logprob,
            top_token_ids=[token for token, _ in entry.top],
            top_logprobs=[logprob for _, logprob in entry.top],
            drafter=entry.drafter,
        )


def decode_logprobs(protos: Iterable[tokens_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities."""
    return tuple(map(_decode_logprob, protos))


def _decode_logprob(proto: tokens_pb2.TokenLogprob) -> TokenLogprob:
    _check_length(proto.top_logprobs, "top_logprobs", len(proto.top_token_ids))
    for value in (proto.logprob, *proto.top_logprobs):
        bounded(value, "logprob", -math.inf, _MAX_LOGPROB)
    return TokenLogprob(
        token=proto.token_id,
        logprob=proto.logprob,
        top=tuple(zip(proto.top_token_ids, proto.top_logprobs, strict=True)),
        drafter=proto.drafter,
    )
