"""Clients that time a request's answer: a server over HTTP, or the same code in this process.

Both take the request body as JSON values.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from cascade.api import build_request, responses
from cascade.api.completion import Completions
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import CascadeError, Internal, InvalidMeasurement, Overloaded, Unavailable
from cascade.evaluation.scoring import import_extra
from cascade.evaluation.structured import ToolCall
from cascade.local import local_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.evaluation.workloads import Item
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

TIMEOUT_S = 600.0

_RETRIES = 8

_EXTENSIONS = ("cascade", "top_k", "min_p")  # request fields that OpenAI's client does not know


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionResult:
    """A whole answer, with times in seconds from the request."""

    text: str  # without thoughts and tool calls, where the server reads them
    finish_reason: str | None
    statistics: Json  # `usage.cascade`; empty from a server that has none
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    ttft_s: float  # to the first text; the latency if there was none
    chunk_times_s: tuple[float, ...] = field(default=(), repr=False)  # of each chunk with text
    draft_lengths: tuple[int, ...] = ()  # tokens drafted in each round, where rounds were traced
    calls: tuple[ToolCall, ...] = ()


class Client(Protocol):
    """Completes chats and texts."""

    @property
    def name(self) -> str:
        """Return what a later run must match to resume this one."""
        ...

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the answer to a request body; raises a CascadeError."""
        ...


def request_body(item: Item, *, seed: int | None = None, **fields: Any) -> Json:
    """Return the request body of an item.

    Args:
        item: What to ask.
        seed: Makes the answer repeatable.
        fields: More fields of the request, such as `temperature` and `cascade`.
    """
    body: Json = {"max_tokens": item.max_tokens, **structure(item), **fields}
    if seed is not None:
        body["seed"] = seed
    if item.completion:
        return {"prompt": item.messages[0].content, **body}
    return {"messages": [asdict(message) for message in item.messages], **body}


def structure(item: Item) -> Json:
    """Return the fields of a request that say what its answer must be, if anything does.

    Without a grammar a model is shown its tools, but calls what it likes as it likes.
    """
    if item.tools:
        tools = item.tools if item.has_grammar else map(_without_strict, item.tools)
        return {
            "tools": list(tools),
            "tool_choice": item.tool_choice if item.has_grammar else "auto",
            "parallel_tool_calls": any(len(json.loads(right)) > 1 for right in item.references),
        }
    if item.schema is None or not item.has_grammar:
        return {}
    schema = {"name": "answer", "schema": item.schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _without_strict(tool: Json) -> Json:
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


class HttpClient:
    """Streams answers from a server with OpenAI's client."""

    def __init__(self, client: Any, *, url: str, model: str) -> None:
        self._client = client
        self._model = model
        self.name = f"{url} {model}"

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the server's answer.

        Raises:
            InvalidMeasurement: The server refuses the request.
            Unavailable: It cannot be reached, or the connection breaks.
        """
        openai = import_extra("openai")
        try:
            return await self._complete(dict(body))
        except openai.APIStatusError as error:
            if error.status_code < 500:  # noqa: PLR2004 - where the server's own failures begin
                raise InvalidMeasurement(f"the server refuses: {error.message}") from error
            raise Unavailable(f"the server fails: {error.message}") from error
        except openai.APIError as error:
            raise Unavailable(f"cannot reach the server at {self.name}: {error}") from error

    async def _complete(self, body: Json) -> CompletionResult:
        start_s = time.perf_counter()
        extensions = {name: body.pop(name) for name in _EXTENSIONS if name in body}
        api = self._client.chat if "messages" in body else self._client
        texts: list[str] = []
        calls: dict[int, ToolCall] = {}
        times_s: list[float] = []
        usage = finish_reason = None
        async with await api.completions.create(
            model=self._model,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extensions,
            **body,
        ) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text = choice.text if hasattr(choice, "text") else choice.delta.content
                    finish_reason = choice.finish_reason or finish_reason
                    parts = getattr(choice, "delta", None) and choice.delta.tool_calls
                    for part in parts or ():
                        calls[part.index] = _joined(calls.get(part.index), part.function)
                    if text or parts:
                        texts.append(text or "")
                        times_s.append(time.perf_counter() - start_s)
        if finish_reason is None or usage is None:
            raise Unavailable("the server's stream ended before its answer")
        latency_s = time.perf_counter() - start_s
        return CompletionResult(
            text="".join(texts),
            finish_reason=finish_reason,
            statistics=(usage.model_extra or {}).get("cascade") or {},
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            latency_s=latency_s,
            ttft_s=times_s[0] if times_s else latency_s,
            chunk_times_s=tuple(times_s),
            calls=tuple(calls.values()),
        )


def _joined(call: ToolCall | None, part: Any) -> ToolCall:
    """Return a call with what a chunk adds to it."""
    name, arguments = part.name or "", part.arguments or ""
    if call is None:
        return ToolCall(name, arguments)
    return ToolCall(call.name + name, call.arguments + arguments)


class InProcessClient:
    """Calls a service in this process: the server's own request parsing, without HTTP."""

    def __init__(self, service: ServingContext, *, name: str) -> None:
        self.service = service
        self.name = name

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the answer; a tier that is full is tried again.

        Raises:
            InvalidMeasurement: The service refuses the request.
            CascadeError: What ended the answer early.
        """
        try:
            if "messages" in body:
                call = build_request.chat(ChatBody.model_validate(body), self.service)
            else:
                call = build_request.completion(CompletionBody.model_validate(body), self.service)
        except (CascadeError, ValueError) as error:
            raise InvalidMeasurement(f"the request is refused: {error}") from error
        for _ in range(_RETRIES):
            try:
                return await self._complete(call)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s or 1)
        return await self._complete(call)

    async def _complete(self, call: CompletionCall) -> CompletionResult:
        completions = Completions(call, self.service)
        start_s = time.perf_counter()
        times_s = [
            time.perf_counter() - start_s
            async for item in completions.stream()
            if item is not None and item[1].text
        ]
        latency_s = time.perf_counter() - start_s
        usage = responses.usage_object(completions.usage)
        whole = completions.all[0].output
        if whole.finish is None:
            raise Internal("An answer ended without a reason")
        return CompletionResult(
            text=whole.text if whole.message is None else whole.message.content,
            finish_reason=whole.finish.value,
            statistics=usage["cascade"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            latency_s=latency_s,
            ttft_s=times_s[0] if times_s else latency_s,
            chunk_times_s=tuple(times_s),
            draft_lengths=tuple(one.drafted for one in completions.usage.statistics.trace),
            calls=tuple(
                ToolCall(call.name or "", call.arguments)
                for call in (whole.message.calls if whole.message else ())
            ),
        )


@asynccontextmanager
async def connect_http(
    url: str, *, api_key: str | None = None, model: str | None = None
) -> AsyncGenerator[HttpClient]:
    """Connect to a server.

    Args:
        url: The address, with or without `/v1`.
        api_key: If the server needs one.
        model: Which served model answers; the first if absent.

    Raises:
        InvalidMeasurement: openai is not installed, or no server answers there.
    """
    openai = import_extra("openai")
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    async with openai.AsyncOpenAI(
        base_url=base, api_key=api_key or "none", max_retries=_RETRIES, timeout=TIMEOUT_S
    ) as client:
        yield HttpClient(client, url=base, model=model or await _first_model(client, url))


async def _first_model(client: Any, url: str) -> str:
    openai = import_extra("openai")
    try:
        models = await client.with_options(max_retries=0, timeout=10).models.list()
    except openai.APIStatusError as error:
        raise InvalidMeasurement(
            f"the server at {url} answers {error.status_code}: {error.message}"
        ) from error
    except openai.APIError as error:
        raise InvalidMeasurement(
            f"no server answers at {url} ({error}); start one with `serve run cluster/local.yaml`,"
            " or omit --url to answer in this process"
        ) from error
    if not models.data:
        raise InvalidMeasurement(f"the server at {url} serves no model")
    return models.data[0].id


@asynccontextmanager
async def start_in_process(settings: Application) -> AsyncGenerator[InProcessClient]:
    """Start both tiers in this process, with a drafter deadline that never passes.

    Otherwise a drafter that is late on a busy machine would be left out of a round, and the counts
    would depend on the machine.

    Raises:
        StartupError: The pair cannot be served.
    """
    router = replace(settings.router, draft_deadline_s=TIMEOUT_S)
    names = [
        model_identity(tier.model_path, tier.revision)
        for tier in (settings.drafter, settings.expert)
    ]
    async with local_server(settings.model_copy(update={"router": router})) as running:
        yield InProcessClient(running.service, name=f"in process: {' and '.join(names)}")


def model_identity(path: str, revision: str | None) -> str:
    """Return a model's name with its revision, or with a digest of its files if it is a folder."""
    folder = Path(path)
    if not folder.is_dir():
        return path if revision is None else f"{path}@{revision}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"
