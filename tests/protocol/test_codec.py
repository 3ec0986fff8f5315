from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import InvalidRequest
from cascade.protocol import messages
from cascade.protocol.codec import (
    decode_client_message,
    decode_server_message,
    encode_frame,
    parse_frame,
    session_of,
)
from cascade.protocol.services import DRAFTER, EXPERT
from cascade.v1 import drafter_pb2, expert_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.protocol.codec import ClientMessage, FrameType, ServerMessage

CLIENT_MESSAGES = [(DRAFTER.request, kind) for kind in get_args(messages.ToDrafter)] + [
    (EXPERT.request, kind) for kind in get_args(messages.ToExpert)
]

SERVER_MESSAGES = [(DRAFTER.response, kind) for kind in get_args(messages.FromDrafter)] + [
    (EXPERT.response, kind) for kind in get_args(messages.FromExpert)
]

FRAME_TYPES = [DRAFTER.request, EXPERT.request, DRAFTER.response, EXPERT.response]


@pytest.mark.parametrize(("frame_type", "kind"), CLIENT_MESSAGES)
@given(data=st.data())
def test_every_client_message_survives_a_round_trip(
    frame_type: FrameType, kind: type[ClientMessage], data: st.DataObject
) -> None:
    message = data.draw(st.from_type(kind))
    (item,) = parse_frame(encode_frame(message, frame_type), frame_type)
    assert repr(decode_client_message(item)) == repr(message)
    opens = isinstance(message, messages.Open)
    session_id = message.session.id if opens else message.session_id
    assert session_of(item) == (session_id, message.epoch)


@pytest.mark.parametrize(("frame_type", "kind"), SERVER_MESSAGES)
@given(data=st.data())
def test_every_server_message_survives_a_round_trip(
    frame_type: FrameType, kind: type[ServerMessage], data: st.DataObject
) -> None:
    message = data.draw(st.from_type(kind))
    (item,) = parse_frame(encode_frame(message, frame_type), frame_type)
    assert repr(decode_server_message(item)) == repr(message)
    assert session_of(item) == (message.session_id, message.epoch)


@given(sent=st.lists(st.from_type(messages.Judge) | st.from_type(messages.Close), max_size=4))
def test_joined_frames_are_one_frame_of_all_messages(sent: list[ClientMessage]) -> None:
    joined = b"".join(encode_frame(message, EXPERT.request) for message in sent)
    parsed = parse_frame(joined, EXPERT.request)
    assert repr([decode_client_message(item) for item in parsed]) == repr(sent)


@pytest.mark.parametrize("frame_type", FRAME_TYPES)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(frame_type: FrameType, data: bytes) -> None:
    _decode_or_refuse(data, frame_type)


@pytest.mark.parametrize(("frame_type", "kind"), CLIENT_MESSAGES + SERVER_MESSAGES)
@given(data=st.data())
def test_damaged_frames_are_decoded_or_refused(
    frame_type: FrameType, kind: type[ClientMessage | ServerMessage], data: st.DataObject
) -> None:
    damaged = bytearray(encode_frame(data.draw(st.from_type(kind)), frame_type))
    for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[index] = data.draw(st.integers(0, 255))
    _decode_or_refuse(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), frame_type)


def _decode_or_refuse(data: bytes, frame_type: FrameType) -> None:
    decode: Callable[[Any], ClientMessage | ServerMessage] = (
        decode_client_message
        if frame_type in (DRAFTER.request, EXPERT.request)
        else decode_server_message
    )
    try:
        for item in parse_frame(data, frame_type):
            session_of(item)
            decode(item)
    except InvalidRequest as refused:
        assert refused.message  # noqa: PT017 - both outcomes are right, other exceptions are not


def judge(**fields: Any) -> expert_pb2.JudgeRequestItem:
    body = expert_pb2.Judge(session_id="s", epoch=1, position=5)
    body.MergeFrom(expert_pb2.Judge(**fields))
    return expert_pb2.JudgeRequestItem(judge=body)


def block(**fields: Any) -> expert_pb2.JudgeRequestItem:
    return judge(block=tokens_pb2.Block(**fields))


def row(**fields: Any) -> expert_pb2.JudgeRequestItem:
    return block(token_ids=[1], rows=[tokens_pb2.Row(**fields)])


def opened(**fields: Any) -> expert_pb2.JudgeRequestItem:
    policy = tokens_pb2.Policy(
        rule=tokens_pb2.Rule(lossless=tokens_pb2.Lossless()),
        coupling=tokens_pb2.COUPLING_MAXIMAL,
        bonus=tokens_pb2.BONUS_EXPERT,
        verification=tokens_pb2.VERIFICATION_TOKEN,
        row_format=tokens_pb2.ROW_FORMAT_AUTO,
        row_entry_count=8,
    )
    policy.MergeFrom(tokens_pb2.Policy(**fields))
    session = tokens_pb2.Session(session_id="s", prompt_token_ids=[1], policy=policy)
    return expert_pb2.JudgeRequestItem(open=tokens_pb2.Open(session=session, epoch=1))


def session(**fields: Any) -> expert_pb2.JudgeRequestItem:
    item = opened()
    item.open.session.MergeFrom(tokens_pb2.Session(**fields))
    return item


def sampled(**fields: Any) -> expert_pb2.JudgeRequestItem:
    return opened(sampling=tokens_pb2.Sampling(**fields))


def unknown_enum(name: str) -> expert_pb2.JudgeRequestItem:
    return opened(**{name: 77})


def empty_prompt() -> expert_pb2.JudgeRequestItem:
    item = opened()
    item.open.session.ClearField("prompt_token_ids")
    return item


INVALID = {
    "item has no kind": expert_pb2.JudgeRequestItem(),
    "`session_id` has 0": expert_pb2.JudgeRequestItem(judge=expert_pb2.Judge(position=1)),
    "`session_id` has 129": expert_pb2.JudgeRequestItem(
        judge=expert_pb2.Judge(session_id="x" * 129)
    ),
    "`epoch` is -1": judge(epoch=-1),
    "`position` is -4": judge(position=-4),
    "`position` is 5; it must be at least 6": judge(token_ids=[0] * 6),
    "`ahead_count` is -1": judge(ahead_count=-1),
    "`likelihoods` has 2 entries; it must have 0 or 1": block(token_ids=[1], likelihoods=[1, 1]),
    "`likelihoods` is nan": block(token_ids=[1], likelihoods=[math.nan]),
    "`likelihoods` is -0.1": block(token_ids=[1], likelihoods=[-0.1]),
    "`unscaled_likelihoods` has 1": block(unscaled_likelihoods=[1]),
    "`unscaled_likelihoods` is inf": block(token_ids=[1], unscaled_likelihoods=[math.inf]),
    "`gates` has 3": block(token_ids=[1], gates=[tokens_pb2.Gates()] * 3),
    "`gates.peak` is 1.5": block(gates=[tokens_pb2.Gates(peak=1.5)]),
    "`gates.entropy` is inf": block(gates=[tokens_pb2.Gates(entropy=math.inf)]),
    "`rows` has 3": block(token_ids=[1], rows=[tokens_pb2.Row()] * 3),
    "`logprobs` has 2": block(token_ids=[1], logprobs=[tokens_pb2.TokenLogprob()] * 2),
    "`logprob` is nan": block(token_ids=[1], logprobs=[tokens_pb2.TokenLogprob(logprob=math.nan)]),
    "`logprob` is 2.0": block(token_ids=[1], logprobs=[tokens_pb2.TokenLogprob(logprob=2)]),
    "`top_logprobs` has 0 entries; it must have 1": block(
        token_ids=[1], logprobs=[tokens_pb2.TokenLogprob(top_token_ids=[4])]
    ),
    "`rows.token_ids` has 3 bytes": row(token_ids=b"abc", weights=b"\0\x3c"),
    "`rows.weights` has 1 bytes": row(weights=b"a"),
    "`rows.unscaled_weights` has 1 bytes": row(weights=b"\0\x3c", unscaled_weights=b"a"),
    "`rows.weights` has a weight that is negative": row(weights=b"\0\xbc"),
    "`rows.weights` has a weight that is negative, infinite": row(weights=b"\0\x7c"),
    "`rows.weights` has a weight that is negative, infinite or no number": row(weights=b"\1\x7c"),
    "a row has 2 ids and 1 weights": row(token_ids=bytes(8), weights=b"\0\x3c"),
    "a row has 1 weights and 2 unscaled": row(weights=b"\0\x3c", unscaled_weights=b"\0\x3c\0\0"),
    "a row has no positive weight": row(weights=bytes(4)),
    "`prompt_token_ids` is empty": empty_prompt(),
    "`origins` has 0 entries; it must have 1": session(token_ids=[1]),
    "`origin` is 0": session(token_ids=[1], origins=[tokens_pb2.ORIGIN_UNSPECIFIED]),
    "`coupling` is 77": unknown_enum("coupling"),
    "`bonus` is 77": unknown_enum("bonus"),
    "`verification` is 77": unknown_enum("verification"),
    "`row_format` is 77": unknown_enum("row_format"),
    "`row_entry_count` is -2": opened(row_entry_count=-2),
    "`seed` is -1": opened(seed=-1),
    "`logprob_count` is -1": opened(logprob_count=-1),
    "`temperature` is nan": sampled(temperature=math.nan),
    "`temperature` is inf": sampled(temperature=math.inf),
    "`temperature` is -1.0": sampled(temperature=-1),
    "`top_k` is -1": sampled(top_k=-1),
    "`top_p` is 0.0": sampled(top_p=0),
    "`top_p` is nan": sampled(top_p=math.nan),
    "`min_p` is 2.0": sampled(min_p=2),
    "`repetition_penalty` is 0.0": sampled(repetition_penalty=0),
    "`presence_penalty` is nan": sampled(presence_penalty=math.nan),
    "`frequency_penalty` is inf": sampled(frequency_penalty=math.inf),
    "`logit_bias` is nan": sampled(logit_biases=[tokens_pb2.LogitBias(bias=math.nan)]),
    "`token_ids` is empty": expert_pb2.JudgeRequestItem(score=expert_pb2.Score(session_id="s")),
}


@pytest.mark.parametrize(("text", "item"), INVALID.items(), ids=INVALID.keys())
def test_an_invalid_value_is_refused_by_name(text: str, item: expert_pb2.JudgeRequestItem) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_client_message(item)
    assert text in refused.value.message


def test_bytes_that_are_no_frame_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"3 bytes are no cascade\.v1\.DraftRequest"):
        parse_frame(b"\xff\xff\xff", drafter_pb2.DraftRequest)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_does_not_fit_the_proto_is_not_sent(token: int) -> None:
    message = messages.Propose(
        session_id=messages.SessionId("s"), epoch=1, position=1, digest=0, count=1, tokens=(token,)
    )
    with pytest.raises(InvalidRequest, match="Propose cannot be sent"):
        encode_frame(message, DRAFTER.request)
