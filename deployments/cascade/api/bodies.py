"""Reads the bodies of requests: bounded in size, in time, and in how many at once.

A request holds one of a router's places (`max_ongoing_requests`) while its body arrives. Whoever
sends many slowly must not take them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.errors import BodyTooLarge, BodyTooSlow, InvalidRequest
from cascade.protocol.arrivals import Arrivals

if TYPE_CHECKING:
    from starlette.requests import Request

THREAD_BYTES = 2**16  # tokenizing a body of this size would delay other streams
_DRAINED_BODIES = 16  # a body larger than this many times the limit is not read to its end


class Bodies:
    """The bodies that one router reads now."""

    def __init__(self) -> None:
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self._arrivals)

    async def read(
        self, request: Request, *, caller: str, most_bytes: int, most_bodies: int, within_s: float
    ) -> bytes:
        """Return the body of a request.

        Args:
            request: Its headers are read.
            caller: Who sends it.
            most_bytes: Of the body.
            most_bodies: That are read at the same time.
            within_s: How long the body may take.

        Raises:
            InvalidRequest: It is compressed.
            BodyTooLarge: Some of it is read too, so that its sender gets the error.
            BodyTooSlow: It takes too long, or longest of too many.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", ""}:
            raise InvalidRequest(
                f"The body is compressed ({encoding[:80]}); send it as it is, without"
                " `Content-Encoding`"
            )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > _DRAINED_BODIES * most_bytes:
            raise _too_large(most_bytes)
        try:
            async with self._arrivals.place(caller, most=most_bodies, within_s=within_s):
                return await _read(request, most_bytes)
        except TimeoutError as error:
            raise BodyTooSlow(
                f"The body did not arrive within {within_s:g} s, or too many were on their way"
                f" ({most_bodies}) and this one for longest; send it again"
            ) from error


async def _read(request: Request, most_bytes: int) -> bytes:
    size, parts = 0, list[bytes]()
    async for part in request.stream():
        size += len(part)
        if size <= most_bytes:
            parts.append(part)
        elif size > _DRAINED_BODIES * most_bytes:
            break
    if size > most_bytes:
        raise _too_large(most_bytes)
    return b"".join(parts)


def _too_large(most_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {most_bytes} bytes, this server's limit")
