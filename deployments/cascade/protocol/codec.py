"""Frames as bytes and back: the one place that knows both `wire.frames` and `cascade.v1`.

`encode` returns a frame of one item. Frames concatenate (protobuf merges messages that stand one
behind the other, and repeated fields append), so a coalesced frame is the join of single ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf.message import DecodeError

from cascade.errors import InvalidRequest
from cascade.protocol import messages
from cascade.protocol.convert import (
    decode_block,
    decode_logprobs,
    decode_session,
    decode_session_id,
    decode_verdict,
    encode_block,
    encode_logprobs,
    encode_session,
    encode_verdict,
    whole,
    within,
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


def encode_frame(item: ClientMessage | ServerMessage, frame_type: FrameType) -> bytes:
    """Return the bytes of a frame that holds the item.

    Raises:
        InvalidRequest: a number of the item does not fit the wire, such as a token id of 2**32.
    """
    name, write = _ENCODERS[type(item)]
    frame = frame_type()
    message = getattr(frame.items.add(), name)
    message.SetInParent()
    try:
        write(item, message)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{type(item).__name__} cannot be sent: {error}") from error
    return frame.SerializeToString()


def parse_frame(data: bytes, frame_type: FrameType) -> Sequence[FrameItem]:
    """Return the items of a frame, still as messages; raises InvalidRequest if it is none."""
    try:
        return frame_type.FromString(data).items
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(data)} bytes are no {frame_type.DESCRIPTOR.full_name}: {error}"
        ) from error


def decode_client_message(message: FrameItem) -> ClientMessage:
    """Return what a client asks; raises InvalidRequest for what `encode` cannot have written."""
    name = _kind(message)
    return _QUESTIONS[name](getattr(message, name))


def decode_server_message(message: FrameItem) -> ServerMessage:
    """Return what a replica answers; raises InvalidRequest as `decode_question` does."""
    name = _kind(message)
    return _ANSWERS[name](getattr(message, name))


def session_of(message: FrameItem) -> tuple[SessionId, int] | None:
    """Return session and epoch of an item that may be malformed; None if it names no session."""
    name = message.WhichOneof("item")
    if name is None:
        return None
    body = getattr(message, name)
    try:
        return decode_session_id((body.session if name == "open" else body).session_id), body.epoch
    except InvalidRequest:
        return None


def _kind(message: FrameItem) -> str:
    name = message.WhichOneof("item")
    if name is None:
        raise InvalidRequest("an item has no kind; set exactly one")
    return name


def _head(message: Any) -> dict[str, Any]:
    return {
        "session_id": decode_session_id(message.session_id),
        "epoch": whole(message.epoch, "epoch"),
    }


def _encode_head(item: Any, to: Any) -> None:
    to.session_id = item.session_id
    to.epoch = item.epoch


def _encode_open(item: messages.Open, to: tokens_pb2.Open) -> None:
    encode_session(item.session, to.session)
    to.epoch = item.epoch
    to.lease = item.lease
    to.traceparent = item.traceparent


def _decode_open(message: tokens_pb2.Open) -> messages.Open:
    return messages.Open(
        session=decode_session(message.session),
        epoch=whole(message.epoch, "epoch"),
        lease=message.lease,
        traceparent=message.traceparent,
    )


def _encode_propose(item: messages.Propose, to: drafter_pb2.Propose) -> None:
    _encode_head(item, to)
    to.position = item.position
    to.digest = item.digest
    to.draft_limit = item.count
    to.token_ids.extend(item.tokens)
    to.deferral_stop = item.until_deferral
    to.ahead_count = item.ahead
    to.survival_floor = item.floor
    to.branch_count = item.branches


def _decode_propose(message: drafter_pb2.Propose) -> messages.Propose:
    return messages.Propose(
        **_head(message),
        position=whole(message.position, "position", least=len(message.token_ids)),
        digest=message.digest,
        count=whole(message.draft_limit, "draft_limit"),
        tokens=tuple(message.token_ids),
        until_deferral=message.deferral_stop,
        ahead=whole(message.ahead_count, "ahead_count"),
        floor=within(message.survival_floor, "survival_floor", 0.0, 1.0),
        branches=whole(message.branch_count, "branch_count"),
    )


def _encode_judge(item: messages.Judge, to: expert_pb2.Judge) -> None:
    _encode_head(item, to)
    to.position = item.position
    to.digest = item.digest
    encode_block(item.block, to.block)
    to.token_ids.extend(item.tokens)
    to.ahead_count = item.ahead


def _decode_judge(message: expert_pb2.Judge) -> messages.Judge:
    return messages.Judge(
        **_head(message),
        position=whole(message.position, "position", least=len(message.token_ids)),
        digest=message.digest,
        block=decode_block(message.block),
        tokens=tuple(message.token_ids),
        ahead=whole(message.ahead_count, "ahead_count"),
    )


def _encode_score(item: messages.Score, to: expert_pb2.Score) -> None:
    _encode_head(item, to)
    to.lease = item.lease
    to.token_ids.extend(item.tokens)
    to.top_count = item.top


def _decode_score(message: expert_pb2.Score) -> messages.Score:
    if not message.token_ids:
        raise InvalidRequest("`token_ids` is empty; there is nothing to score")
    return messages.Score(
        **_head(message),
        lease=message.lease,
        tokens=tuple(message.token_ids),
        top=whole(message.top_count, "top_count"),
    )


def _decode_close(message: tokens_pb2.Close) -> messages.Close:
    return messages.Close(**_head(message))


def _encode_proposal(item: messages.Proposal, to: drafter_pb2.Proposal) -> None:
    _encode_head(item, to)
    to.position = item.position
    to.digest = item.digest
    encode_block(item.block, to.block)
    to.deferred = item.deferred
    to.pass_count = item.passes
    to.cached_prompt_token_count = item.cached_prompt_tokens
    _encode_timing(item.timing, to.timing)
    to.branched = item.branched


def _decode_proposal(message: drafter_pb2.Proposal) -> messages.Proposal:
    return messages.Proposal(
        **_head(message),
        position=whole(message.position, "position"),
        digest=message.digest,
        block=decode_block(message.block),
        deferred=message.deferred,
        passes=whole(message.pass_count, "pass_count"),
        cached_prompt_tokens=whole(message.cached_prompt_token_count, "cached_prompt_token_count"),
        timing=_decode_timing(message.timing),
        branched=message.branched,
    )


def _encode_judgement(item: messages.Judgement, to: expert_pb2.Judgement) -> None:
    _encode_head(item, to)
    to.position = item.position
    to.digest = item.digest
    encode_verdict(item.verdict, to.verdict)
    to.cached_prompt_token_count = item.cached_prompt_tokens
    _encode_timing(item.timing, to.timing)


def _decode_judgement(message: expert_pb2.Judgement) -> messages.Judgement:
    return messages.Judgement(
        **_head(message),
        position=whole(message.position, "position"),
        digest=message.digest,
        verdict=decode_verdict(message.verdict),
        cached_prompt_tokens=whole(message.cached_prompt_token_count, "cached_prompt_token_count"),
        timing=_decode_timing(message.timing),
    )


def _encode_timing(timing: Timing, to: tokens_pb2.Timing) -> None:
    """Write the timing into the message; times are sent as whole microseconds."""
    to.service_us = round(1e6 * timing.service_s)
    to.step_us = round(1e6 * timing.step_s)
    to.token_count = timing.tokens
    to.session_count = timing.sessions
    to.open_count = timing.open


def _decode_timing(message: tokens_pb2.Timing) -> Timing:
    """Return the timing."""
    return Timing(
        service_s=whole(message.service_us, "service_us") / 1e6,
        step_s=whole(message.step_us, "step_us") / 1e6,
        tokens=whole(message.token_count, "token_count"),
        sessions=whole(message.session_count, "session_count"),
        open=whole(message.open_count, "open_count"),
    )


def _encode_scores(item: messages.Scores, to: expert_pb2.Scores) -> None:
    _encode_head(item, to)
    encode_logprobs(item.logprobs, to.logprobs)


def _decode_scores(message: expert_pb2.Scores) -> messages.Scores:
    return messages.Scores(**_head(message), logprobs=decode_logprobs(message.logprobs))


def _encode_need(item: messages.Need, to: tokens_pb2.Need) -> None:
    _encode_head(item, to)
    to.position = item.position


def _decode_need(message: tokens_pb2.Need) -> messages.Need:
    return messages.Need(**_head(message), position=whole(message.position, "position"))


def _encode_refusal(item: messages.Refusal, to: tokens_pb2.Refusal) -> None:
    _encode_head(item, to)
    to.code = item.code
    to.reason = item.reason
    to.message = item.message


def _decode_refusal(message: tokens_pb2.Refusal) -> messages.Refusal:
    # The epoch is that of the refused item, which may be anything.
    return messages.Refusal(
        session_id=decode_session_id(message.session_id),
        epoch=message.epoch,
        code=message.code,
        reason=message.reason,
        message=message.message,
    )


_ENCODERS: dict[type, tuple[str, Callable[[Any, Any], None]]] = {
    messages.Open: ("open", _encode_open),
    messages.Propose: ("propose", _encode_propose),
    messages.Judge: ("judge", _encode_judge),
    messages.Score: ("score", _encode_score),
    messages.Close: ("close", _encode_head),
    messages.Proposal: ("proposal", _encode_proposal),
    messages.Judgement: ("judgement", _encode_judgement),
    messages.Scores: ("scores", _encode_scores),
    messages.Need: ("need", _encode_need),
    messages.Refusal: ("refusal", _encode_refusal),
}

_QUESTIONS: dict[str, Callable[[Any], ClientMessage]] = {
    "open": _decode_open,
    "propose": _decode_propose,
    "judge": _decode_judge,
    "score": _decode_score,
    "close": _decode_close,
}

_ANSWERS: dict[str, Callable[[Any], ServerMessage]] = {
    "proposal": _decode_proposal,
    "judgement": _decode_judgement,
    "scores": _decode_scores,
    "need": _decode_need,
    "refusal": _decode_refusal,
}
