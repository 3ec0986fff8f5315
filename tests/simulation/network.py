"""A network that is slow, forgets, repeats and reorders, and is cut."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cascade.protocol.server import TierServer  # noqa: TC001 - a field of a dataclass

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from random import Random

    from cascade.protocol.services import TierKind

KEEPALIVE_S = 10.0  # of silence, until both ends of a stream know


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How frames fare."""

    delay_s: float = 0.001
    dropped: float = 0.0
    repeated: float = 0.0
    reordered: float = 0.0


@dataclass(eq=False, kw_only=True)
class Host:
    """Where a replica listens."""

    server: TierServer
    up: bool = True
    cut_until_s: float = 0.0  # from the router
    calls: list[SimCall] = field(default_factory=list["SimCall"])


class Network:
    """All streams of one router."""

    def __init__(self, chance: Random, weather: Weather) -> None:
        self.chance = chance
        self.weather = weather
        self.hosts: dict[str, Host] = {}

    def dial(self, address: str, kind: TierKind) -> SimCall:
        """Begin a call; a host that is down refuses it a moment later."""
        call = SimCall(self, self.hosts[address], kind)
        if call.host.up:
            call.host.calls.append(call)
            call.serve()
        else:
            asyncio.get_running_loop().call_later(self.weather.delay_s, call.end)
        return call

    def kill(self, address: str, *, silently: bool) -> None:
        """End a host at once; the router hears of it now, or by its silence."""
        host = self.hosts[address]
        host.up = False
        calls, host.calls = host.calls, []
        for call in calls:
            call.end_server()
            after_s = KEEPALIVE_S if silently else self.weather.delay_s
            asyncio.get_running_loop().call_later(after_s, call.end)

    def cut(self, address: str, *, for_s: float) -> None:
        """Let nothing pass for a while; a stream that is silent too long is ended by both."""
        host, loop = self.hosts[address], asyncio.get_running_loop()
        host.cut_until_s = max(host.cut_until_s, loop.time() + for_s)
        if for_s > KEEPALIVE_S:
            for call in host.calls:
                loop.call_later(KEEPALIVE_S, call.end)

    def end_calls(self, address: str) -> None:
        """Cut every stream, which both ends notice."""
        for call in list(self.hosts[address].calls):
            call.end()


class _Way:
    """One direction of a call."""

    def __init__(self, network: Network, host: Host) -> None:
        self.frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._network = network
        self._host = host
        self._last_s = 0.0

    def send(self, frame: bytes) -> None:
        chance, weather = self._network.chance, self._network.weather
        if chance.random() < weather.dropped:
            return
        for _ in range(1 + (chance.random() < weather.repeated)):
            self._deliver(frame)

    def _deliver(self, frame: bytes) -> None:
        loop = asyncio.get_running_loop()
        chance, weather = self._network.chance, self._network.weather
        at_s = max(loop.time(), self._host.cut_until_s) + weather.delay_s * chance.expovariate(1)
        if chance.random() >= weather.reordered:
            at_s = self._last_s = max(at_s, self._last_s + 1e-9)  # else in no order
        loop.call_at(at_s, self.frames.put_nowait, frame)


class SimCall:
    """One call: the client's end, and the server's as a task."""

    def __init__(self, network: Network, host: Host, kind: TierKind) -> None:
        self.host = host
        self._kind = kind
        self._up = _Way(network, host)
        self._down = _Way(network, host)
        self._server: asyncio.Task[None] | None = None

    def serve(self) -> None:
        self._server = asyncio.create_task(self._serve())

    def end_server(self) -> None:
        if self._server is not None:
            self._server.cancel()

    def end(self) -> None:
        """Let both ends read their end."""
        self._up.frames.put_nowait(None)
        self._down.frames.put_nowait(None)

    async def write(self, frame: bytes) -> None:
        self._up.send(frame)

    async def read(self) -> object:
        return await self._down.frames.get()

    async def close(self) -> None:
        """End the call, as the server learns when the network lets it."""
        loop = asyncio.get_running_loop()
        at_s = max(loop.time(), self.host.cut_until_s)
        loop.call_at(at_s, self._up.frames.put_nowait, None)

    async def _serve(self) -> None:
        context: Any = _Context(self._down)
        with suppress(_AbortedError):
            await self.host.server._stream(self._requests(), context)  # pyright: ignore[reportPrivateUsage] - what grpc is given
        if self in self.host.calls:
            self.host.calls.remove(self)
        self._down.frames.put_nowait(None)

    async def _requests(self) -> AsyncGenerator[bytes]:
        while (frame := await self._up.frames.get()) is not None:
            yield frame


class _AbortedError(Exception):
    pass


class _Context:
    """What a handler is given."""

    def __init__(self, down: _Way) -> None:
        self._down = down

    async def write(self, frame: bytes) -> None:
        self._down.send(frame)

    async def abort(self, *_: object) -> None:
        raise _AbortedError
