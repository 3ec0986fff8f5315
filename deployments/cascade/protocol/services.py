"""The gRPC services of the two tiers: method names, frame types, limits and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from grpc_health.v1 import health_pb2

from cascade.errors import DrafterUnavailable, ExpertUnavailable, Unavailable
from cascade.v1 import drafter_pb2, expert_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from cascade.protocol.codec import FrameType


class LeaseTicket(TypedDict):
    """The only item that a lease call yields."""

    address: str
    token: str


PROTOCOL_VERSION = 2
FRAME_LIMIT_BYTES = 64 * 2**20
FRAME_LIMIT_MESSAGES = 4096
DRAFT_LIMIT = 64  # tokens of a block
LEASE_KEY = "cascade-lease"  # of the metadata that opens a stream: the token of any lease
HEARTBEAT_S = 1.0  # at most this long between two frames of a working replica

STREAM_OPTIONS = (
    # gRPC adds a few bytes to a frame of the largest size.
    ("grpc.max_receive_message_length", FRAME_LIMIT_BYTES + 1024),
    ("grpc.max_send_message_length", FRAME_LIMIT_BYTES + 1024),
    # A client that is cut off is noticed within 10 s. The keepalive timeout alone is not enough:
    # gRPC waits a minute for the response to a ping.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierKind:
    """The service of a tier: a streaming method for sessions and a unary one that describes it."""

    name: str
    service: str
    stream_method: str
    describe_method: str
    request: FrameType
    response: FrameType
    description: Any  # the response type of `describe_method`
    unavailable: type[Unavailable]  # raised when no replica is reachable

    def path(self, method: str) -> str:
        """Return the full name of a method."""
        return f"/{self.service}/{method}"


DRAFTER = TierKind(
    name="drafter",
    service="cascade.v1.DrafterService",
    stream_method="Draft",
    describe_method="DescribeDrafter",
    request=drafter_pb2.DraftRequest,
    response=drafter_pb2.DraftResponse,
    description=drafter_pb2.DescribeDrafterResponse,
    unavailable=DrafterUnavailable,
)

EXPERT = TierKind(
    name="expert",
    service="cascade.v1.ExpertService",
    stream_method="Judge",
    describe_method="DescribeExpert",
    request=expert_pb2.JudgeRequest,
    response=expert_pb2.JudgeResponse,
    description=expert_pb2.DescribeExpertResponse,
    unavailable=ExpertUnavailable,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a replica serves and which limits it enforces."""

    model: str
    vocab_size: int  # token ids are below it
    context_length: int  # tokens of prompt and completion together
    tokenizer_fingerprint: str
    protocol_version: int = PROTOCOL_VERSION
    draft_limit: int = DRAFT_LIMIT  # tokens per block
    session_limit: int = 1024  # per stream
    item_limit: int = FRAME_LIMIT_MESSAGES  # per frame
    frame_limit_bytes: int = FRAME_LIMIT_BYTES
    source_length: int = 0  # tokens that an encoder reads; 0: a decoder-only model


def encode_description(description: Description, kind: TierKind) -> bytes:
    """Return the serialized response of `describe_method`."""
    message = kind.description()
    for name in Description.__slots__:
        setattr(message.description, name, getattr(description, name))
    return message.SerializeToString()


def decode_description(data: bytes, kind: TierKind) -> Description:
    """Return the description; raises google.protobuf DecodeError for other bytes."""
    message: tokens_pb2.Description = kind.description.FromString(data).description
    return Description(**{name: getattr(message, name) for name in Description.__slots__})


def health_list(
    statuses: Iterable[tuple[str, health_pb2.HealthCheckResponse.ServingStatus]],
) -> Message:
    """Return the response of `grpc.health.v1.Health/List`."""
    response: Any = health_pb2.HealthListResponse()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType] - absent from the stubs
    for name, status in statuses:
        response.statuses[name].status = status
    return response
