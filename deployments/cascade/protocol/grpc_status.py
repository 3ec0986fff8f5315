"""Our errors as gRPC statuses and back, with `google.rpc` details (AIP-193).

Ray Serve's proxy copies what a call sets on its context only when a message passes. So a unary call
fails by setting the status and returning an answer, a stream by setting it and yielding one last
frame; setting and merely returning from a stream would reach the client as success.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cascade import errors
from cascade.errors import CascadeError
from cascade.protocol.messages import Refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Iterator

    from google.protobuf.any_pb2 import Any as AnyMessage

    from cascade.types import SessionId

DOMAIN = "cascade.v1"

DETAILS_KEY = "grpc-status-details-bin"

SESSION_NOT_FOUND = "SESSION_NOT_FOUND"

# A client refuses trailing metadata of more than 8 KiB, and with it the whole answer.
_LONGEST_MESSAGE = 1024

Answer = TypeVar("Answer")


class Context(Protocol):
    """What `grpc.aio` and Ray Serve both let a call set."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code."""
        ...

    def set_details(self, details: str) -> None:
        """Set the status text."""
        ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set the metadata that follows the last message."""
        ...


def reason(error: CascadeError) -> str:
    """Return the error's word for programs, UPPER_SNAKE_CASE."""
    return _reason(type(error))


def code(error: CascadeError) -> grpc.StatusCode:
    """Return the status code of the error."""
    return grpc.StatusCode[error.grpc]


def message(error: CascadeError) -> str:
    """Return the text of the error, cut where a client would no longer take it."""
    if len(error.message) <= _LONGEST_MESSAGE:
        return error.message
    return error.message[: _LONGEST_MESSAGE - 1] + "…"


def trailing_metadata(error: CascadeError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries the details of the error."""
    return ((DETAILS_KEY, _status(error).SerializeToString()),)


def fail(context: Context, error: CascadeError) -> None:
    """Set the status of a call; a message must follow, see the module."""
    context.set_code(code(error))
    context.set_details(message(error))
    # Ray Serve's context adds this to a list of its own.
    context.set_trailing_metadata(list(trailing_metadata(error)))


async def guard(context: Context, call: Awaitable[Answer], *, failed: Answer) -> Answer:
    """Return what a unary call returns, or `failed` with the status set."""
    try:
        return await call
    except CascadeError as error:
        fail(context, error)
        return failed


async def guard_stream(
    context: Context, frames: AsyncGenerator[Answer], *, failed: Answer
) -> AsyncGenerator[Answer]:
    """Yield what a stream yields; if it fails, `failed` is the last frame, with the status."""
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield frame
    except CascadeError as error:
        fail(context, error)
        yield failed


def to_error(error: grpc.aio.AioRpcError) -> CascadeError:
    """Return the error behind a failed call, told by its details, else by its code."""
    text = error.details() or error.code().name
    info, retry = _details(error)
    kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    ours = (kind or _BY_CODE.get(error.code().name, errors.Internal))(text)
    ours.param = info.metadata.get("param") or None
    if retry is not None:
        ours.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return ours


def refusal(session_id: SessionId, epoch: int, error: CascadeError) -> Refusal:
    """Return the item that tells one session of an error."""
    return Refusal(
        session_id=session_id,
        epoch=epoch,
        code=error.grpc,
        reason=reason(error),
        message=message(error),
    )


def unknown_session(session_id: SessionId, epoch: int) -> Refusal:
    """Return the refusal of an item whose session is not open on its stream."""
    return Refusal(
        session_id=session_id,
        epoch=epoch,
        code="NOT_FOUND",
        reason=SESSION_NOT_FOUND,
        message=f"session {session_id!r} is not open on this stream; open it first",
    )


def error_from_refusal(
    item: Refusal, *, lost: type[errors.Unavailable] = errors.Unavailable
) -> CascadeError:
    """Return the error behind a refusal; a session that is not there is a lost replica, `lost`."""
    if item.reason == SESSION_NOT_FOUND:
        return lost(item.message)
    kind = _BY_REASON.get(item.reason) or _BY_CODE.get(item.code, errors.Internal)
    return kind(item.message)


def _status(error: CascadeError) -> Status:
    metadata = {"type": error.type} | ({"param": error.param} if error.param else {})
    status = Status(code=code(error).value[0], message=message(error))
    status.details.add().Pack(ErrorInfo(reason=reason(error), domain=DOMAIN, metadata=metadata))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def _details(error: grpc.aio.AioRpcError) -> tuple[ErrorInfo, RetryInfo | None]:
    info, retry = ErrorInfo(), None
    for detail in _packed(error):
        detail.Unpack(info)  # does nothing unless the type is right
        found = RetryInfo()
        if detail.Unpack(found):
            retry = found
    return info, retry


def _packed(error: grpc.aio.AioRpcError) -> Iterator[AnyMessage]:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                yield from Status.FromString(value).details
            except DecodeError:
                return


def _reason(kind: type[CascadeError]) -> str:
    return (kind.code or "invalid_request").upper()


def _tree(kind: type[CascadeError]) -> Iterator[type[CascadeError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _tree(child)


# The first of a reason is the nearest to the root, the others are its special cases.
_BY_REASON: dict[str, type[CascadeError]] = {
    _reason(kind): kind for kind in reversed(list(_tree(CascadeError)))
}

_BY_CODE: dict[str, type[CascadeError]] = {
    kind.grpc: kind
    for kind in (
        errors.InvalidRequest,
        errors.Unauthenticated,
        errors.ModelNotFound,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Unavailable,
        errors.Cancelled,
    )
}
