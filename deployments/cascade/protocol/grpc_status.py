"""Our errors as gRPC statuses with `google.rpc` details (AIP-193), and as refusals of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cascade.errors import CascadeError, Internal, Unavailable
from cascade.protocol.messages import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.types import SessionId

DOMAIN = "cascade.v1"

DETAILS_KEY = "grpc-status-details-bin"

SESSION_NOT_FOUND = "SESSION_NOT_FOUND"

# Clients refuse trailing metadata of more than 8 KiB, and with it the whole response.
# As bytes: the status text has three per byte that is not ASCII.
_MAX_MESSAGE_BYTES = 1024


def reason(error: CascadeError | type[CascadeError]) -> str:
    """Return the error's machine-readable name in UPPER_SNAKE_CASE."""
    return (error.code or "invalid_request").upper()


def code(error: CascadeError) -> grpc.StatusCode:
    """Return the status code of the error."""
    return grpc.StatusCode[error.grpc]


def message(error: CascadeError) -> str:
    """Return the text of the error, cut to what clients accept."""
    data = error.message.encode(errors="replace")
    if len(data) <= _MAX_MESSAGE_BYTES:
        return data.decode()
    return data[: _MAX_MESSAGE_BYTES - len("…".encode())].decode(errors="ignore") + "…"


def trailing_metadata(error: CascadeError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries the details of the error."""
    metadata = {"type": error.type} | ({"param": error.param} if error.param else {})
    status = Status(code=code(error).value[0], message=message(error))
    status.details.add().Pack(ErrorInfo(reason=reason(error), domain=DOMAIN, metadata=metadata))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return ((DETAILS_KEY, status.SerializeToString()),)


def refusal(session_id: SessionId, epoch: int, error: CascadeError) -> Refusal:
    """Return the message that tells one session's router of an error.

    Args:
        session_id: The refused session.
        epoch: The epoch of the message that is refused.
        error: Why it is refused.
    """
    return Refusal(
        session_id=session_id,
        epoch=epoch,
        code=error.grpc,
        reason=reason(error),
        message=message(error),
    )


def unknown_session(session_id: SessionId, epoch: int) -> Refusal:
    """Return the refusal of a message whose session is not open on its stream."""
    return Refusal(
        session_id=session_id,
        epoch=epoch,
        code="NOT_FOUND",
        reason=SESSION_NOT_FOUND,
        message=f"session {session_id!r} is not open on this stream; open it first",
    )


def error_from_refusal(refusal: Refusal, *, lost: type[Unavailable] = Unavailable) -> CascadeError:
    """Return the error that a refusal carries; if the replica lost the session, `lost`."""
    if refusal.reason == SESSION_NOT_FOUND:
        return lost(refusal.message)
    kind = _BY_REASON.get(refusal.reason) or _BY_CODE.get(refusal.code, Internal)
    return kind(refusal.message)


def _subclasses(kind: type[CascadeError]) -> Iterator[type[CascadeError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


# Reversed, so that of several with one reason or code the one nearest to the root stays.
_ERRORS = list(reversed(list(_subclasses(CascadeError))))
_BY_REASON = {reason(kind): kind for kind in _ERRORS}
_BY_CODE = {kind.grpc: kind for kind in _ERRORS}
