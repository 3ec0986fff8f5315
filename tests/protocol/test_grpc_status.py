from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from cascade import errors
from cascade.errors import CascadeError
from cascade.protocol import grpc_status
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator


def leaves(kind: type[CascadeError] = CascadeError) -> Iterator[type[CascadeError]]:
    for child in kind.__subclasses__():
        yield child
        yield from leaves(child)


# What stops a server before it serves has one word for all its kinds, and crosses no wire.
KINDS = [kind for kind in leaves() if not issubclass(kind, errors.StartupError)]


@dataclass(slots=True)
class Call:
    """A call's context that keeps what it is told, as both servers' contexts do."""

    code: grpc.StatusCode | None = None
    details: str = ""
    metadata: list[Any] = field(default_factory=list[Any])

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.metadata = list(trailing_metadata)


def over_grpc(error: CascadeError) -> CascadeError:
    trailing = grpc.aio.Metadata(*grpc_status.trailing_metadata(error))
    return grpc_status.to_error(
        grpc.aio.AioRpcError(
            grpc_status.code(error),
            grpc.aio.Metadata(),
            trailing,
            details=grpc_status.message(error),
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_a_call(kind: type[CascadeError]) -> None:
    error = kind("Ärger with `n`")
    error.param = "n"
    back = over_grpc(error)
    assert type(back) is kind
    assert (back.message, back.param) == (error.message, "n")
    assert back.retry_after_s == error.retry_after_s


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_a_refusal(kind: type[CascadeError]) -> None:
    item = grpc_status.refusal(SessionId("s"), 3, kind("why"))
    assert (item.session_id, item.epoch, item.code) == ("s", 3, kind.grpc)
    back = grpc_status.error_from_refusal(item)
    assert (type(back), back.message) == (kind, "why")


@pytest.mark.parametrize("kind", KINDS)
def test_reasons_are_words_for_programs(kind: type[CascadeError]) -> None:
    """AIP-193: UPPER_SNAKE_CASE, at most 63 characters."""
    word = grpc_status.reason(kind("why"))
    assert word.isascii()
    assert word.replace("_", "").isalnum()
    assert word == word.upper()
    assert len(word) <= 63


def test_the_time_to_wait_survives() -> None:
    assert over_grpc(errors.Overloaded("full", retry_after_s=2.5)).retry_after_s == 2.5


def test_a_long_message_is_cut() -> None:
    """Trailing metadata over 8 KiB would cost the client the whole answer."""
    error = errors.InvalidRequest("x" * 100_000)
    assert len(over_grpc(error).message) == 1024
    ((_, packed),) = grpc_status.trailing_metadata(error)
    assert len(packed) < 2000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFound),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
        (grpc.StatusCode.DATA_LOSS, errors.Internal),
    ],
)
@pytest.mark.parametrize("trailing", [(), ((grpc_status.DETAILS_KEY, b"\xff\xff"),)])
def test_an_error_without_details_is_told_by_its_code(
    code: grpc.StatusCode, kind: type[CascadeError], trailing: tuple[tuple[str, bytes], ...]
) -> None:
    error = grpc_status.to_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=None)
    )
    assert type(error) is kind
    assert error.message == code.name


def test_a_lost_session_is_a_lost_replica() -> None:
    item = grpc_status.unknown_session(SessionId("s"), 1)
    assert item.code == "NOT_FOUND"
    error = grpc_status.error_from_refusal(item, lost=errors.ExpertUnavailable)
    assert isinstance(error, errors.ExpertUnavailable)


async def test_a_unary_call_fails_with_an_answer() -> None:
    """Ray Serve's proxy keeps the details only if a message passes."""

    async def answer() -> str:
        raise errors.ModelNotFound("no such model")

    call = Call()
    assert await grpc_status.guard(call, answer(), failed="empty") == "empty"
    assert call.code is grpc.StatusCode.NOT_FOUND
    assert call.details == "no such model"
    assert call.metadata[0][0] == grpc_status.DETAILS_KEY


async def test_a_unary_call_that_succeeds_sets_nothing() -> None:
    async def answer() -> str:
        return "full"

    call = Call()
    assert await grpc_status.guard(call, answer(), failed="empty") == "full"
    assert call.code is None


async def test_a_stream_fails_with_a_last_frame() -> None:
    """A stream that sets its status and merely returns reaches the client as success."""

    async def frames() -> AsyncGenerator[str]:
        yield "first"
        raise errors.Overloaded("full")

    call = Call()
    seen = [frame async for frame in grpc_status.guard_stream(call, frames(), failed="last")]
    assert seen == ["first", "last"]
    assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_left_early_closes_what_it_reads() -> None:
    closed: list[bool] = []

    async def frames() -> AsyncGenerator[str]:
        try:
            yield "first"
        finally:
            closed.append(True)

    guarded = grpc_status.guard_stream(Call(), frames(), failed="last")
    assert await anext(guarded) == "first"
    await guarded.aclose()
    assert closed == [True]
