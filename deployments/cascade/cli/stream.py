"""A completion as it streams from a server: tokens, who wrote them, and what they cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0
_DATA = "data:"
_END = "[DONE]"


class AskError(Exception):
    """Why there is no whole answer, in one line; `status` is the exit status."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A piece of the answer. `origin` is d, k or e, and None from a server that does not say."""

    text: str
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came with the answer: OpenAI's usage, the reason it ended and the rounds, if asked."""

    usage: dict[str, Any]
    finish: str | None
    trace: list[dict[str, Any]]


def complete(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[Token | Report]:
    """Yield the tokens of one answer as they come, and at the end a report.

    Raises:
        AskError: No server, an error of the server, or a stream that was cut.
    """
    request = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("POST", path, json=request) as response:
            if response.is_error:
                response.read()
                raise AskError(_refusal(response))
            yield from _read(response)
    except httpx.ConnectError as error:
        raise AskError(
            f"no server answers at {client.base_url} ({error}); "
            "start one with `serve run cluster/local.yaml`, or name another with --url",
            status=3,
        ) from error
    except httpx.TimeoutException as error:
        raise AskError(
            f"the server at {client.base_url} fell silent; the answer stops here", status=3
        ) from error
    except httpx.HTTPError as error:
        raise AskError(f"the connection to {client.base_url} broke: {error}", status=3) from error


def _read(response: httpx.Response) -> Iterator[Token | Report]:
    usage: dict[str, Any] = {}
    finish: str | None = None
    trace: list[dict[str, Any]] = []
    for data in _events(response):
        usage = data.get("usage") or usage
        for choice in data.get("choices", [])[:1]:
            finish = choice.get("finish_reason") or finish
            trace = (choice.get("cascade") or {}).get("trace", trace)
            yield from _tokens(choice)
    yield Report(usage=usage, finish=finish, trace=trace)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream up to its end mark."""
    for line in response.iter_lines():
        if not line.startswith(_DATA):
            continue
        text = line.removeprefix(_DATA).strip()
        if text == _END:
            return
        event = _parsed(text)
        if "error" in event:
            raise AskError(_message(event["error"]))
        yield event
    raise AskError("the stream was cut before its end; the answer may be incomplete")


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise AskError(f"the server sent {text[:80]!r} where JSON was expected")
    return value


def _tokens(choice: dict[str, Any]) -> Iterator[Token]:
    """Yield a choice's new tokens, or its text as one piece if the server does not name tokens."""
    extension = choice.get("cascade") or {}
    if extension.get("tokens"):
        for text, origin in zip(extension["tokens"], extension["origins"], strict=False):
            yield Token(text=text, origin=origin)
        return
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    if text:
        yield Token(text=text)


def _refusal(response: httpx.Response) -> str:
    """Return what an error response says, in one line."""
    try:
        message = _message(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(response.text.split())[:200] or response.reason_phrase
    return f"{response.status_code}: {message}"


def _message(error: Any) -> str:
    """Return the message of OpenAI's error object, with the parameter it names."""
    if not isinstance(error, dict):
        return str(error)
    param = f" (parameter {error['param']})" if error.get("param") else ""
    return f"{error.get('message', error)}{param}"
