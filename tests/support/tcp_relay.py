"""A TCP relay in front of a server, to cut its connections, stop forwarding or read along."""

from __future__ import annotations

import asyncio


class TcpRelay:
    """Forwards connections to an address until it is cut, or forwards nothing while `silent`."""

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.address = ""
        self.silent = False
        self.seen = bytearray()  # all that was forwarded, in both directions
        self._writers: list[asyncio.StreamWriter] = []
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    def cut(self) -> None:
        """Abort all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        if self._listener is not None:
            self._listener.close()
            await self._listener.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(*self.target)
        self._writers += (writer, target_writer)
        await asyncio.gather(self._copy(reader, target_writer), self._copy(target_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.seen += data
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            self.cut()
