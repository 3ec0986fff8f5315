"""Who answers: a server over HTTP, or the same doors and loop in this process.

Both take the body of a request, as JSON values, and time what comes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from cascade.api import build_request, responses
from cascade.api.completion import Completions
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import CascadeError, Internal, InvalidMeasurement, Overloaded, Unavailable
from cascade.evaluation.scoring import extra
from cascade.local import local_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.evaluation.workloads import Item
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

PATIENT_S = 600.0

_RETRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, and when, in seconds from the request."""

    text: str
    finish: str | None
    statistics: Json  # `usage.cascade`; empty from a server that has none
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    ttft_s: float  # to the first piece of text; the latency if there was none
    marks_s: tuple[float, ...] = field(default=(), repr=False)  # of each piece of text
    blocks: tuple[int, ...] = ()  # tokens drafted in each round, where rounds were traced


class Answerer(Protocol):
    """Answers the body of a chat or of a text completion."""

    @property
    def name(self) -> str:
        """Say who answers: what a later run must match to go on."""
        ...

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the answer; raises a CascadeError."""
        ...


def body(item: Item, *, seed: int | None = None, **more: Any) -> Json:
    """Return the request that asks an item.

    Args:
        item: What is asked.
        seed: Makes the answer repeatable.
        more: Fields of the request, such as `temperature` and `cascade`.
    """
    asked: Json = {"max_tokens": item.max_tokens, **more}
    if seed is not None:
        asked["seed"] = seed
    if item.completion:
        return {"prompt": item.messages[0].content, **asked}
    turns = [{"role": turn.role, "content": turn.content} for turn in item.messages]
    return {"messages": turns, **asked}


class OverHttp:
    """Asks a server with OpenAI's client, streaming."""

    def __init__(self, client: Any, *, url: str, model: str) -> None:
        self._client = client
        self._model = model
        self.name = f"{url} {model}"

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the server's answer.

        Raises:
            InvalidMeasurement: The server refuses the request.
            Unavailable: It cannot be reached, or breaks off.
        """
        openai = extra("openai")
        try:
            return await self._answer(dict(body))
        except openai.APIStatusError as error:
            if error.status_code < 500:  # noqa: PLR2004 - where the server's own failures begin
                raise InvalidMeasurement(f"the server refuses: {error.message}") from error
            raise Unavailable(f"the server fails: {error.message}") from error
        except openai.APIError as error:
            raise Unavailable(f"the server at {self.name} cannot be heard: {error}") from error

    async def _answer(self, asked: Json) -> Answer:
        began_s = time.perf_counter()
        more = {name: asked.pop(name) for name in ("cascade", "top_k", "min_p") if name in asked}
        door = self._client.chat if "messages" in asked else self._client
        watch = _Watch()
        async with await door.completions.create(
            model=self._model,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=more,
            **asked,
        ) as chunks:
            async for chunk in chunks:
                watch.chunk(chunk, at_s=time.perf_counter() - began_s)
        return watch.answer(latency_s=time.perf_counter() - began_s)


class _Watch:
    """Puts an answer together from the chunks of a stream."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._marks_s: list[float] = []
        self._usage: Any = None
        self._finish: str | None = None

    def chunk(self, chunk: Any, *, at_s: float) -> None:
        """Hear one chunk of a chat or of a text."""
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            self._finish = choice.finish_reason or self._finish
            if text:
                self._texts.append(text)
                self._marks_s.append(at_s)

    def answer(self, *, latency_s: float) -> Answer:
        """Return the whole answer; raises Unavailable if the stream had no end."""
        if self._finish is None or self._usage is None:
            raise Unavailable("the server's stream ended before its answer")
        return Answer(
            text="".join(self._texts),
            finish=self._finish,
            statistics=(self._usage.model_extra or {}).get("cascade") or {},
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            latency_s=latency_s,
            ttft_s=self._marks_s[0] if self._marks_s else latency_s,
            marks_s=tuple(self._marks_s),
        )


class InProcess:
    """Asks a service, without HTTP: the doors' own translation, and the loop over gRPC."""

    def __init__(self, service: ServingContext, *, name: str) -> None:
        self.service = service
        self.name = name

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the answer; a tier that is full is asked again.

        Raises:
            InvalidMeasurement: The service refuses the request.
            CascadeError: What ended the answer early.
        """
        call = self._call(body)
        for _ in range(_RETRIES):
            try:
                return await self._answer(call)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s or 1)
        return await self._answer(call)

    def _call(self, body: Mapping[str, Any]) -> CompletionCall:
        try:
            if "messages" in body:
                return build_request.chat(ChatBody.model_validate(body), self.service)
            return build_request.completion(CompletionBody.model_validate(body), self.service)
        except (CascadeError, ValueError) as error:
            raise InvalidMeasurement(f"the request is refused: {error}") from error

    async def _answer(self, call: CompletionCall) -> Answer:
        answers = Completions(call, self.service)
        began_s = time.perf_counter()
        marks_s = [
            time.perf_counter() - began_s
            async for heard in answers.write()
            if heard is not None and heard[1].text
        ]
        latency_s = time.perf_counter() - began_s
        usage = responses.usage_object(answers.usage)
        whole = answers.all[0].whole
        if whole.finish is None:
            raise Internal("An answer ended without a reason")
        return Answer(
            text=whole.text,
            finish=whole.finish.value,
            statistics=usage["cascade"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            latency_s=latency_s,
            ttft_s=marks_s[0] if marks_s else latency_s,
            marks_s=tuple(marks_s),
            blocks=tuple(row.drafted for row in answers.usage.statistics.trace),
        )


@asynccontextmanager
async def over_http(
    url: str, *, api_key: str | None = None, model: str | None = None
) -> AsyncGenerator[OverHttp]:
    """Reach a server; its first model answers unless one is named.

    Raises:
        InvalidMeasurement: openai is not installed, or no server answers there.
    """
    openai = extra("openai")
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    async with openai.AsyncOpenAI(
        base_url=base, api_key=api_key or "none", max_retries=_RETRIES, timeout=PATIENT_S
    ) as client:
        named = model or await _first_model(client, url)
        yield OverHttp(client, url=base, model=named)


async def _first_model(client: Any, url: str) -> str:
    openai = extra("openai")
    try:
        models = await client.with_options(max_retries=0, timeout=10).models.list()
    except openai.APIError as error:
        raise InvalidMeasurement(
            f"no server answers at {url} ({error}); start one with `serve run cluster/local.yaml`,"
            " or leave --url out to answer in this process"
        ) from error
    if not models.data:
        raise InvalidMeasurement(f"the server at {url} serves no model")
    return models.data[0].id


@asynccontextmanager
async def in_process(settings: Application) -> AsyncGenerator[InProcess]:
    """Start both tiers here and answer with them; no draft is given up for being late.

    A drafter that is late on a busy machine is otherwise left out of a round, which would make
    counts depend on the machine.

    Raises:
        StartupError: The pair cannot be served.
    """
    patient = settings.router.model_copy(update={"draft_deadline_s": PATIENT_S})
    names = [
        identity(tier.model_path, tier.revision) for tier in (settings.drafter, settings.expert)
    ]
    async with local_server(settings.model_copy(update={"router": patient})) as running:
        yield InProcess(running.service, name=f"in process: {' and '.join(names)}")


def identity(place: str, revision: str | None) -> str:
    """Return a model's name and what changes when its files do."""
    folder = Path(place)
    if not folder.is_dir():
        return place if revision is None else f"{place}@{revision}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return f"{folder.name}@{digest.hexdigest()[:12]}"
