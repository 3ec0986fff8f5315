"""A network that delays, drops, repeats and reorders frames, and that can be cut."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cascade.protocol.server import TierServer  # noqa: TC001 - a field of a dataclass
from cascade.protocol.services import LEASE_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from random import Random

    from cascade.protocol.services import TierKind

KEEPALIVE_S = 10.0  # of silence, after which both ends of a stream consider it lost


@dataclass(frozen=True, kw_only=True)
class NetworkConditions:
    """The mean delay of a frame, and the probability of each fault."""

    delay_s: float = 0.001
    dropped: float = 0.0
    repeated: float = 0.0
    reordered: float = 0.0


@dataclass(eq=False, kw_only=True)
class Host:
    """The machine of a replica."""

    server: TierServer
    up: bool = True
    cut_until_s: float = 0.0  # unreachable from the router until then
    calls: list[SimCall] = field(default_factory=list["SimCall"])


class Network:
    """All streams of one router."""

    def __init__(self, rng: Random, conditions: NetworkConditions) -> None:
        self.rng = rng
        self.conditions = conditions
        self.hosts: dict[str, Host] = {}

    def dial(self, address: str, kind: TierKind, lease: str) -> SimCall:
        """Begin a call; a host that is down refuses it a moment later."""
        call = SimCall(self, self.hosts[address], kind, lease)
        if call.host.up:
            call.host.calls.append(call)
            call.serve()
        else:
            asyncio.get_running_loop().call_later(self.conditions.delay_s, call.end)
        return call

    def kill(self, address: str, *, silently: bool) -> None:
        """Stop a host at once; the router notices now, or only by the keepalive timeout."""
        host = self.hosts[address]
        host.up = False
        calls, host.calls = host.calls, []
        for call in calls:
            call.end_server()
            after_s = KEEPALIVE_S if silently else self.conditions.delay_s
            asyncio.get_running_loop().call_later(after_s, call.end)

    def cut(self, address: str, *, for_s: float) -> None:
        """Hold all frames back for a while; a stream that is silent too long ends at both ends."""
        host, loop = self.hosts[address], asyncio.get_running_loop()
        host.cut_until_s = max(host.cut_until_s, loop.time() + for_s)
        if for_s > KEEPALIVE_S:
            for call in host.calls:
                loop.call_later(KEEPALIVE_S, call.end)

    def end_calls(self, address: str) -> None:
        """End every stream; both ends notice."""
        for call in list(self.hosts[address].calls):
            call.end()


class _Direction:
    """One direction of a call."""

    def __init__(self, network: Network, host: Host) -> None:
        self.frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._network = network
        self._host = host
        self._last_s = 0.0

    def send(self, frame: bytes) -> None:
        rng, conditions = self._network.rng, self._network.conditions
        if rng.random() < conditions.dropped:
            return
        for _ in range(1 + (rng.random() < conditions.repeated)):
            self._deliver(frame)

    def _deliver(self, frame: bytes) -> None:
        loop = asyncio.get_running_loop()
        rng, conditions = self._network.rng, self._network.conditions
        at_s = max(loop.time(), self._host.cut_until_s) + conditions.delay_s * rng.expovariate(1)
        if rng.random() >= conditions.reordered:
            at_s = self._last_s = max(at_s, self._last_s + 1e-9)  # after all frames before it
        loop.call_at(at_s, self.frames.put_nowait, frame)


class SimCall:
    """One call: the client's end, with the server's as a task."""

    def __init__(self, network: Network, host: Host, kind: TierKind, lease: str) -> None:
        self.host = host
        self._lease = lease
        self._kind = kind
        self._up = _Direction(network, host)
        self._down = _Direction(network, host)
        self._server: asyncio.Task[None] | None = None

    def serve(self) -> None:
        self._server = asyncio.create_task(self._serve())

    def end_server(self) -> None:
        if self._server is not None:
            self._server.cancel()

    def end(self) -> None:
        """Let both ends read the end of the stream."""
        self._up.frames.put_nowait(None)
        self._down.frames.put_nowait(None)

    async def write(self, frame: bytes) -> None:
        self._up.send(frame)

    async def read(self) -> object:
        return await self._down.frames.get()

    async def close(self) -> None:
        """End the call; the server notices as soon as the network is not cut."""
        loop = asyncio.get_running_loop()
        at_s = max(loop.time(), self.host.cut_until_s)
        loop.call_at(at_s, self._up.frames.put_nowait, None)

    async def _serve(self) -> None:
        context: Any = _Context(self._down, self._lease)
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
    """The servicer context of a call."""

    def __init__(self, down: _Direction, lease: str) -> None:
        self._down = down
        self._lease = lease

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((LEASE_KEY, self._lease),)

    async def write(self, frame: bytes) -> None:
        self._down.send(frame)

    async def abort(self, *_: object) -> None:
        raise _AbortedError
