"""Sessions, blocks and verdicts as messages.

`encode_*` writes into a message that the frame already owns, so that large rows are copied once.
`decode_*` raises InvalidRequest for all that our values could not have produced.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cascade.decoding.session import (
    Block,
    Gates,
    Policy,
    Sampling,
    Session,
    SessionId,
    TokenLogprob,
    Verdict,
)
from cascade.errors import InvalidRequest
from cascade.wire.checks import LARGEST_PROBABILITY, finite, length, probabilities, whole, within
from cascade.wire.enums import BONUS, COUPLING, ORIGIN, ROW_FORMAT, VERIFICATION
from cascade.wire.rows import decode_row, encode_row
from cascade.wire.rules import decode_rule, encode_rule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from cascade.v1 import tokens_pb2

_DEFAULT = Sampling()
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


def _encode_policy(policy: Policy, to: tokens_pb2.Policy) -> None:
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


def _decode_policy(message: tokens_pb2.Policy) -> Policy:
    logprobs = message.logprob_count if message.HasField("logprob_count") else None
    return Policy(
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


def encode_sampling(sampling: Sampling, to: tokens_pb2.Sampling) -> None:
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


def decode_sampling(message: tokens_pb2.Sampling, *, default: Sampling = _DEFAULT) -> Sampling:
    """Return the sampling; what is absent comes from `default`."""

    def given(name: str, absent: float) -> float:
        return getattr(message, name) if message.HasField(name) else absent  # pyright: ignore[reportArgumentType] - the stubs want a literal

    sampling = Sampling(
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


def _check_sampling(sampling: Sampling) -> None:
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
    for gates in block.gates:
        to.gates.add(peak=gates.peak, favourite_token_id=gates.favourite, entropy=gates.entropy)
    for row in block.rows:
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
        gates=tuple(map(_decode_gates, message.gates)),
        rows=tuple(map(decode_row, message.rows)),
        logprobs=decode_logprobs(message.logprobs),
    )


def _decode_gates(message: tokens_pb2.Gates) -> Gates:
    return Gates(
        peak=within(message.peak, "gates.peak", 0.0, LARGEST_PROBABILITY),
        favourite=message.favourite_token_id,
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
