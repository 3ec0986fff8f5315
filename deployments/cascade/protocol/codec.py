"""Messages as frames of bytes and back: the one module that knows `messages` and `cascade.v1`.

`encode_frame` returns a frame of one message. Protobuf appends repeated fields when serialized
messages are concatenated, so frames join by concatenation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf.message import DecodeError

from cascade.errors import InvalidRequest
from cascade.protocol import messages
from cascade.protocol.convert import (
    bounded,
    decode_block,
    decode_divergence,
    decode_logprobs,
    decode_session,
    decode_session_id,
    decode_verdict,
    encode_block,
    encode_logprobs,
    encode_session,
    encode_verdict,
)
from cascade.speculation.cost_model import Timing
from cascade.v1 import drafter_pb2, expert_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.types import SessionId

ClientMessage: TypeAlias = messages.ToDrafter | messages.ToExpert

ServerMessage: TypeAlias = messages.FromDrafter | messages.FromExpert

FrameType: TypeAlias = (
    type[drafter_pb2.DraftRequest]
    | type[drafter_pb2.DraftResponse]
    | type[expert_pb2.JudgeRequest]
    | type[expert_pb2.JudgeResponse]
)

FrameItem: TypeAlias = (
    drafter_pb2.DraftRequestItem
    | drafter_pb2.DraftResponseItem
    | expert_pb2.JudgeRequestItem
    | expert_pb2.JudgeResponseItem
)


def encode_frame(message: ClientMessage | ServerMessage, frame_type: FrameType) -> bytes:
    """Return the bytes of a frame with this one message.

    Raises:
        InvalidRequest: A number does not fit its proto field, such as a token id of 2**32.
    """
    name, encode, _ = _CODECS[type(message)]
    frame = frame_type()
    proto = getattr(frame.items.add(), name)
    proto.SetInParent()
    try:
        encode(message, proto)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{type(message).__name__} cannot be sent: {error}") from error
    return frame.SerializeToString()


def parse_frame(data: bytes, frame_type: FrameType) -> Sequence[FrameItem]:
    """Return the items of a frame, one per message; raises InvalidRequest for other bytes."""
    try:
        return frame_type.FromString(data).items
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(data)} bytes are no {frame_type.DESCRIPTOR.full_name}: {error}"
        ) from error


def decode_client_message(item: FrameItem) -> ClientMessage:
    """Return a router's message; raises InvalidRequest if `encode_frame` cannot have written it."""
    return _decode(item)


def decode_server_message(item: FrameItem) -> ServerMessage:
    """Return a replica's message; raises InvalidRequest as `decode_client_message` does."""
    return _decode(item)


def _decode(item: FrameItem) -> Any:
    name = item.WhichOneof("item")
    if name is None:
        raise InvalidRequest("an item has no kind; set exactly one")
    return _DECODERS[name](getattr(item, name))


def session_of(item: FrameItem) -> tuple[SessionId, int] | None:
    """Return session and epoch of an item that may be malformed; None if it names no session."""
    name = item.WhichOneof("item")
    if name is None:
        return None
    proto = getattr(item, name)
    try:
        session_id = (proto.session if name == "open" else proto).session_id
        return decode_session_id(session_id), proto.epoch
    except InvalidRequest:
        return None


def _encode_ids(message: Any, proto: Any) -> None:
    proto.session_id = message.session_id
    proto.epoch = message.epoch


def _decode_ids(proto: Any) -> dict[str, Any]:
    return {
        "session_id": decode_session_id(proto.session_id),
        "epoch": bounded(proto.epoch, "epoch"),
    }


def _encode_prefix(message: Any, proto: Any) -> None:
    """Write the session and the prefix that the message continues."""
    _encode_ids(message, proto)
    proto.position = message.position
    proto.digest = message.digest


def _decode_prefix(proto: Any, *, min_position: int = 0) -> dict[str, Any]:
    position = bounded(proto.position, "position", min_position)
    return {**_decode_ids(proto), "position": position, "digest": proto.digest}


def _encode_open(message: messages.Open, proto: tokens_pb2.Open) -> None:
    encode_session(message.session, proto.session)
    proto.epoch = message.epoch
    proto.lease = message.lease
    proto.traceparent = message.traceparent
    proto.encoder_ids.extend(message.session.source)
    proto.caller = message.caller
    proto.caller_weight = message.weight
    proto.item_follows = message.message_follows


def _decode_open(proto: tokens_pb2.Open) -> messages.Open:
    return messages.Open(
        session=replace(decode_session(proto.session), source=tuple(proto.encoder_ids)),
        epoch=bounded(proto.epoch, "epoch"),
        lease=proto.lease,
        traceparent=proto.traceparent,
        caller=proto.caller,
        weight=bounded(proto.caller_weight, "caller_weight") or 1,
        message_follows=proto.item_follows,
    )


def _encode_propose(message: messages.Propose, proto: drafter_pb2.Propose) -> None:
    _encode_prefix(message, proto)
    proto.draft_limit = message.count
    proto.token_ids.extend(message.tokens)
    proto.deferral_stop = message.until_deferral
    proto.ahead_count = message.ahead
    proto.survival_floor = message.floor
    proto.branch_count = message.branches


def _decode_propose(proto: drafter_pb2.Propose) -> messages.Propose:
    return messages.Propose(
        **_decode_prefix(proto, min_position=len(proto.token_ids)),
        count=bounded(proto.draft_limit, "draft_limit"),
        tokens=tuple(proto.token_ids),
        until_deferral=proto.deferral_stop,
        ahead=bounded(proto.ahead_count, "ahead_count"),
        floor=bounded(proto.survival_floor, "survival_floor", 0.0, 1.0),
        branches=bounded(proto.branch_count, "branch_count"),
    )


def _encode_judge(message: messages.Judge, proto: expert_pb2.Judge) -> None:
    _encode_prefix(message, proto)
    encode_block(message.block, proto.block)
    proto.token_ids.extend(message.tokens)
    proto.ahead_count = message.ahead
    if message.divergence_left is not None:
        proto.divergence_left = message.divergence_left


def _decode_judge(proto: expert_pb2.Judge) -> messages.Judge:
    return messages.Judge(
        **_decode_prefix(proto, min_position=len(proto.token_ids)),
        block=decode_block(proto.block),
        tokens=tuple(proto.token_ids),
        ahead=bounded(proto.ahead_count, "ahead_count"),
        divergence_left=decode_divergence(proto, "divergence_left"),
    )


def _encode_score(message: messages.Score, proto: expert_pb2.Score) -> None:
    _encode_ids(message, proto)
    proto.lease = message.lease
    proto.token_ids.extend(message.tokens)
    proto.top_count = message.top
    proto.caller = message.caller
    proto.caller_weight = message.weight


def _decode_score(proto: expert_pb2.Score) -> messages.Score:
    if not proto.token_ids:
        raise InvalidRequest("`token_ids` is empty; there is nothing to score")
    return messages.Score(
        **_decode_ids(proto),
        lease=proto.lease,
        tokens=tuple(proto.token_ids),
        top=bounded(proto.top_count, "top_count"),
        caller=proto.caller,
        weight=bounded(proto.caller_weight, "caller_weight") or 1,
    )


def _decode_close(proto: tokens_pb2.Close) -> messages.Close:
    return messages.Close(**_decode_ids(proto))


def _encode_cost(message: messages.Proposal | messages.Judgement, proto: Any) -> None:
    """Write what the reply took; times are sent in whole microseconds."""
    proto.cached_prompt_token_count = message.cached_prompt_tokens
    timing, sent = message.timing, proto.timing
    sent.service_us = round(1e6 * timing.service_s)
    sent.step_us = round(1e6 * timing.step_s)
    sent.token_count = timing.tokens
    sent.session_count = timing.sessions
    sent.open_count = timing.open
    sent.taken_us = round(1e6 * timing.taken_s)


def _decode_cost(proto: Any) -> dict[str, Any]:
    cached = bounded(proto.cached_prompt_token_count, "cached_prompt_token_count")
    received = proto.timing
    timing = Timing(
        service_s=bounded(received.service_us, "service_us") / 1e6,
        step_s=bounded(received.step_us, "step_us") / 1e6,
        tokens=bounded(received.token_count, "token_count"),
        sessions=bounded(received.session_count, "session_count"),
        open=bounded(received.open_count, "open_count"),
        taken_s=bounded(received.taken_us, "taken_us") / 1e6,
    )
    return {"cached_prompt_tokens": cached, "timing": timing}


def _encode_proposal(message: messages.Proposal, proto: drafter_pb2.Proposal) -> None:
    _encode_prefix(message, proto)
    encode_block(message.block, proto.block)
    proto.deferred = message.deferred
    proto.pass_count = message.passes
    _encode_cost(message, proto)
    proto.branched = message.branched
    proto.lost_mass = message.lost_mass


def _decode_proposal(proto: drafter_pb2.Proposal) -> messages.Proposal:
    return messages.Proposal(
        **_decode_prefix(proto),
        block=decode_block(proto.block),
        deferred=proto.deferred,
        passes=bounded(proto.pass_count, "pass_count"),
        **_decode_cost(proto),
        branched=proto.branched,
        lost_mass=proto.lost_mass,
    )


def _encode_judgement(message: messages.Judgement, proto: expert_pb2.Judgement) -> None:
    _encode_prefix(message, proto)
    encode_verdict(message.verdict, proto.verdict)
    _encode_cost(message, proto)


def _decode_judgement(proto: expert_pb2.Judgement) -> messages.Judgement:
    verdict = decode_verdict(proto.verdict)
    return messages.Judgement(**_decode_prefix(proto), verdict=verdict, **_decode_cost(proto))


def _encode_scores(message: messages.Scores, proto: expert_pb2.Scores) -> None:
    _encode_ids(message, proto)
    encode_logprobs(message.logprobs, proto.logprobs)


def _decode_scores(proto: expert_pb2.Scores) -> messages.Scores:
    return messages.Scores(**_decode_ids(proto), logprobs=decode_logprobs(proto.logprobs))


def _encode_need(message: messages.Need, proto: tokens_pb2.Need) -> None:
    _encode_ids(message, proto)
    proto.position = message.position


def _decode_need(proto: tokens_pb2.Need) -> messages.Need:
    return messages.Need(**_decode_ids(proto), position=bounded(proto.position, "position"))


def _encode_refusal(message: messages.Refusal, proto: tokens_pb2.Refusal) -> None:
    _encode_ids(message, proto)
    proto.code = message.code
    proto.reason = message.reason
    proto.message = message.message


def _decode_refusal(proto: tokens_pb2.Refusal) -> messages.Refusal:
    return messages.Refusal(
        session_id=decode_session_id(proto.session_id),
        epoch=proto.epoch,  # that of the refused message, which may be out of bounds
        code=proto.code,
        reason=proto.reason,
        message=proto.message,
    )


_CODECS: dict[type, tuple[str, Callable[[Any, Any], None], Callable[[Any], Any]]] = {
    messages.Open: ("open", _encode_open, _decode_open),
    messages.Propose: ("propose", _encode_propose, _decode_propose),
    messages.Judge: ("judge", _encode_judge, _decode_judge),
    messages.Score: ("score", _encode_score, _decode_score),
    messages.Close: ("close", _encode_ids, _decode_close),
    messages.Proposal: ("proposal", _encode_proposal, _decode_proposal),
    messages.Judgement: ("judgement", _encode_judgement, _decode_judgement),
    messages.Scores: ("scores", _encode_scores, _decode_scores),
    messages.Need: ("need", _encode_need, _decode_need),
    messages.Refusal: ("refusal", _encode_refusal, _decode_refusal),
}

_DECODERS = {name: decode for name, _, decode in _CODECS.values()}
