from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from tests.support.rpc_errors import status_of

from cascade import errors
from cascade.errors import CascadeError
from cascade.protocol import grpc_status
from cascade.protocol.messages import Refusal
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator


def leaves(kind: type[CascadeError] = CascadeError) -> Iterator[type[CascadeError]]:
    for child in kind.__subclasses__():
        yield child
        yield from leaves(child)


# Startup errors have one reason for all kinds and are never sent.
KINDS = [kind for kind in leaves() if not issubclass(kind, errors.StartupError)]


@pytest.mark.parametrize("kind", KINDS)
def test_trailing_metadata_carries_every_error(kind: type[CascadeError]) -> None:
    error = kind("Ärger with `n`")
    error.param = "n"
    status = status_of(grpc_status.trailing_metadata(error))
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (grpc_status.code(error).value[0], error.message)
    assert (info.domain, info.reason) == ("cascade.v1", grpc_status.reason(error))
    assert dict(info.metadata) == {"type": error.type, "param": "n"}
    assert (len(status.details) == 2) == (error.retry_after_s is not None)
    if error.retry_after_s is not None:
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() / 1e9 == error.retry_after_s


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_a_refusal(kind: type[CascadeError]) -> None:
    refusal = grpc_status.refusal(SessionId("s"), 3, kind("why"))
    assert (refusal.session_id, refusal.epoch, refusal.code) == ("s", 3, kind.grpc)
    back = grpc_status.error_from_refusal(refusal)
    assert (type(back), back.message) == (kind, "why")


@pytest.mark.parametrize("kind", KINDS)
def test_reasons_follow_aip_193(kind: type[CascadeError]) -> None:
    """UPPER_SNAKE_CASE, at most 63 characters."""
    reason = grpc_status.reason(kind("why"))
    assert reason.isascii()
    assert reason.replace("_", "").isalnum()
    assert reason == reason.upper()
    assert len(reason) <= 63


def test_a_long_message_is_cut() -> None:
    """Clients refuse a response whose trailing metadata is larger than 8 KiB."""
    for character in ("x", "é", "語", "🌙", "\ud800"):
        error = errors.InvalidRequest(character * 100_000)
        message = grpc_status.message(error)
        assert 1000 < len(message.encode()) <= 1024
        ((_, packed),) = grpc_status.trailing_metadata(error)
        assert len(packed) + len(quote(message)) < 8000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", errors.Unavailable),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("CANCELLED", errors.Cancelled),
        ("RESOURCE_EXHAUSTED", errors.Overloaded),
        ("INVALID_ARGUMENT", errors.InvalidRequest),
        ("NOT_FOUND", errors.ModelNotFound),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("INTERNAL", errors.Internal),
        ("UNKNOWN", errors.Internal),
        ("DATA_LOSS", errors.Internal),
    ],
)
def test_a_refusal_with_an_unknown_reason_is_read_by_its_code(
    code: str, kind: type[CascadeError]
) -> None:
    refusal = Refusal(session_id=SessionId("s"), epoch=1, code=code, reason="?", message="why")
    assert type(grpc_status.error_from_refusal(refusal)) is kind


def test_an_unknown_session_is_a_lost_replica() -> None:
    refusal = grpc_status.unknown_session(SessionId("s"), 1)
    assert refusal.code == "NOT_FOUND"
    error = grpc_status.error_from_refusal(refusal, lost=errors.ExpertUnavailable)
    assert isinstance(error, errors.ExpertUnavailable)
