"""An HTTP server with fixed responses, in a thread: the commands under test are synchronous."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from contextlib import AbstractContextManager


@dataclass(slots=True)
class RecordingApp:
    """An ASGI app with one response per path, which records the requests."""

    responses: Mapping[str, tuple[int, str, bytes]]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        if body:
            self.bodies.append(json.loads(body))
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        status, kind, content = self.responses.get(scope["path"], (404, "text/plain", b"nothing"))
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for line in content.splitlines(keepends=True):
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextmanager
def _serving(responses: Mapping[str, tuple[int, str, bytes]]) -> Generator[RecordingApp]:
    app = RecordingApp(responses)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield app
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[RecordingApp]]:
    """Return a context manager that serves responses by path on a free loopback port."""
    return _serving
