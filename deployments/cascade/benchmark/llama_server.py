"""The same models served by llama.cpp, as a baseline: the expert alone, and with its drafter.

The server is a `llama-server` binary, or that of the package xllamacpp. It runs in a process of its
own, gets GGUF files of the same weights and prompts as token ids, and has as many threads as our
tiers. Whole answers are asked for, since a stream would cost it an event per token; its own timings
say how long the prompt took.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

from cascade.benchmark import gguf_model
from cascade.benchmark.baseline_requests import Prompts
from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.runner import compare
from cascade.benchmark.systems import Role, System, child_process
from cascade.engine import threads
from cascade.engine.model_loader import load
from cascade.errors import InvalidMeasurement, StartupError, Unavailable
from cascade.evaluation.client import TIMEOUT_S, CompletionResult
from cascade.evaluation.scoring import import_extra

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from cascade.benchmark.baseline_requests import GreedyRequest
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]
Progress: TypeAlias = "Callable[[str], object]"

_CONTEXT_STEP = 256  # llama.cpp rounds a context up to it
_MOST_SLOTS = 64  # more requests wait
_TRIED = 3  # requests, at least, that the drafting schedules are compared on
_START_TIMEOUT_S = 300.0
_LOG_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """How llama.cpp chooses the length of a draft."""

    tokens: int
    confidence: float = 0.0  # the drafter stops before a token that is less likely

    def __str__(self) -> str:
        confidence = f", confidence {self.confidence:g}" if self.confidence else ""
        return f"drafts of {self.tokens}{confidence}"


DRAFTING = (
    *(DraftOptions(tokens=tokens) for tokens in (2, 3, 4, 5, 6, 8)),
    DraftOptions(tokens=8, confidence=0.4),
    DraftOptions(tokens=16, confidence=0.4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """What the servers of one pair have in common."""

    command: tuple[str, ...]
    folder: Path  # of the GGUF files and logs
    prompts: Prompts
    slots: int
    context_tokens: int  # of a slot
    settings: Application
    gpu: bool

    @asynccontextmanager
    async def start(self, drafting: DraftOptions | None = None) -> AsyncGenerator[LlamaServer]:
        """Run a server, with the drafter if there is a schedule.

        Raises:
            StartupError: It does not start.
        """
        port = _free_port()
        path = self.folder / f"{port}.log"
        # As users run it: OpenMP's passive waiting, which our tiers need, would slow it down.
        variables = {
            name: value for name, value in os.environ.items() if name not in threads.environment()
        }
        with path.open("wb") as log:
            async with (
                child_process(
                    *self.command, *self.options(port, drafting), env=variables,
                    stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
                ) as process,
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, trust_env=False,
                    limits=httpx.Limits(max_connections=None),
                ) as http,
            ):  # fmt: skip
                await _healthy(http, process, log=path)
                name = f"llama.cpp, {drafting or 'expert alone'}"
                yield LlamaServer(http, self.prompts, name=name)

    def options(self, port: int, drafting: DraftOptions | None) -> list[str]:
        """Return the command line of a server.

        Args:
            port: Where it listens.
            drafting: How it drafts, if it does.
        """
        given: dict[str, object] = {
            "model": self.folder / "expert.gguf",
            "host": "127.0.0.1",
            "port": port,
            "ctx-size": self.slots * self.context_tokens,
            "parallel": self.slots,
            "cache-ram": 0,  # no copies of ended slots, which no request may use
            "log-verbosity": 1,
        }
        drafter, expert = self.settings.drafter.engine, self.settings.expert.engine
        if expert.threads:
            given["threads"] = expert.threads
        if not self.gpu:
            given["n-gpu-layers"] = 0
        if drafting is not None:
            given |= {
                "spec-draft-model": self.folder / "drafter.gguf",
                "spec-type": "draft-simple",
                "spec-draft-n-max": drafting.tokens,
                "spec-draft-p-min": drafting.confidence,
            }
            if drafter.threads:
                given["threads-draft"] = drafter.threads
            if not self.gpu:
                given["n-gpu-layers-draft"] = 0
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


class LlamaServer:
    """Asks a llama.cpp server for whole answers, as token ids."""

    def __init__(self, http: httpx.AsyncClient, prompts: Prompts, *, name: str) -> None:
        self.name = name
        self.prompts = prompts
        self.http = http

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the answer.

        Raises:
            InvalidMeasurement: The request is not greedy.
            Unavailable: The server fails or refuses.
        """
        request = self.prompts.request(body)
        began_s = time.perf_counter()
        try:
            response = await self.http.post("/completion", json=self.asked(request))
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise Unavailable(f"llama.cpp refuses: {error.response.text.strip()}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"llama.cpp's server fails: {error!r}") from error
        latency_s = time.perf_counter() - began_s
        answer = response.json()
        timings = answer["timings"]
        return self.prompts.answer(
            request,
            answer["tokens"],
            statistics={
                "prompt_ms": timings["prompt_ms"],
                "predicted_ms": timings["predicted_ms"],
                "drafted": timings.get("draft_n", 0),
                "accepted": timings.get("draft_n_accepted", 0),
            },
            latency_s=latency_s,
            # The rest is the wait for a slot, the prompt, and the first token.
            ttft_s=max(0.0, latency_s - timings["predicted_ms"] / 1e3),
        )

    def asked(self, request: GreedyRequest) -> Json:
        """Return the body of a request to the server."""
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            # The cheapest greedy sampling that it has.
            "samplers": ["top_k"],
            "top_k": 1,
            "return_tokens": True,
            "cache_prompt": False,
        }

    async def build(self) -> str:
        """Return the version of the server."""
        response = await self.http.get("/props")
        return str(response.json().get("build_info", "unknown"))


@asynccontextmanager
async def llama_systems(
    settings: Application,
    bodies: Sequence[Json],
    *,
    command: tuple[str, ...],
    concurrency: int,
    progress: Progress,
) -> AsyncGenerator[list[System]]:
    """Serve a pair with llama.cpp: the expert alone, and with the best of its drafting schedules.

    Args:
        settings: Of the pair; a llama.cpp that can use a GPU does if the expert does.
        bodies: The requests to come.
        command: Starts a server; what `command_of` returned.
        concurrency: Requests at once.
        progress: Called with a line about each drafting schedule.

    Raises:
        StartupError: A server does not start.
        UnsupportedModel: llama.cpp cannot run a model.
    """
    with TemporaryDirectory() as folder:
        servers = await asyncio.to_thread(
            prepare,
            settings,
            bodies,
            command=command,
            concurrency=concurrency,
            folder=Path(folder),
        )
        best = await _best_drafting(servers, bodies, concurrency, progress)
        async with servers.start() as alone, servers.start(best) as drafted:
            program = f"{command[0]}, build {await alone.build()}"
            if len(command) > 1:
                program = f"xllamacpp {version('xllamacpp')}"
            note = f"llama.cpp: {program}, with the same weights and a KV cache in float16."
            yield [
                System(name=alone.name, client=alone, role=Role.EXPERT_ALONE, note=note),
                System(name=drafted.name, client=drafted, role=Role.LLAMA_DRAFTED, note=note),
            ]


def command_of(program: str) -> tuple[str, ...]:
    """Return the command that starts a binary, or the server of xllamacpp if there is none.

    Raises:
        InvalidMeasurement: There is no such program, or a package is missing.
    """
    import_extra("gguf", extra="peers")
    if not program:
        import_extra("xllamacpp", extra="peers")
        return (sys.executable, "-m", "cascade.benchmark.xllamacpp_server")
    found = shutil.which(program)
    if found is None:
        raise InvalidMeasurement(
            f"there is no program {program}; give the path of a llama-server binary, or ask for"
            " llama-server without a path, which runs the server of the package xllamacpp"
        )
    return (found,)


def prepare(
    settings: Application,
    bodies: Sequence[Json],
    *,
    command: tuple[str, ...],
    concurrency: int,
    folder: Path,
) -> Servers:
    """Write the GGUF files of a pair, and return what its servers have in common.

    Args:
        settings: Of the pair.
        bodies: The requests to come.
        command: Starts a server.
        concurrency: Requests at once.
        folder: Of the files.

    Raises:
        UnsupportedModel: llama.cpp cannot run a model.
    """
    pair = settings.pair()
    prompts = Prompts(tokenizer=pair.tokenizer, stop_ids=pair.stop_ids)
    gpu = False
    for tier, own in (("expert", settings.expert), ("drafter", settings.drafter)):
        device = settings.expert.engine.device
        model = load(own.model_path, device=device, dtype=own.engine.dtype).model
        gguf_model.write(model, folder / f"{tier}.gguf", stop_ids=pair.stop_ids)
        gpu = model.device.type != "cpu"
    requests = [prompts.request(body) for body in bodies]
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    longest += max(drafting.tokens for drafting in DRAFTING) + 1
    return Servers(
        command=command,
        folder=folder,
        prompts=prompts,
        slots=min(concurrency, _MOST_SLOTS),
        context_tokens=-(-longest // _CONTEXT_STEP) * _CONTEXT_STEP,
        settings=settings,
        gpu=gpu,
    )


async def _best_drafting(
    servers: Servers, bodies: Sequence[Json], concurrency: int, progress: Progress
) -> DraftOptions:
    """Return the schedule that is the fastest on a few requests; each has a server in turn."""
    speeds: dict[DraftOptions, float] = {}
    for drafting in DRAFTING:
        async with servers.start(drafting) as client:
            comparison = await compare(
                [System(name=client.name, client=client)],
                bodies[: max(_TRIED, concurrency)],
                ClosedLoop(concurrency=concurrency),
                rounds=1,
            )
        speeds[drafting] = comparison.systems[client.name].median.tokens_per_s
        progress(f"{client.name}: {speeds[drafting]:.1f} tokens/s")
    return max(speeds, key=speeds.__getitem__)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _healthy(
    http: httpx.AsyncClient, process: asyncio.subprocess.Process, *, log: Path
) -> None:
    """Return when the server serves."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while process.returncode is None:
                with suppress(httpx.TransportError):
                    if (await http.get("/health")).is_success:
                        return
                await asyncio.sleep(0.05)
        reason = "ended before it served"
    except TimeoutError:
        reason = f"did not start within {_START_TIMEOUT_S:g} s"
    said = (await asyncio.to_thread(log.read_text, errors="replace")).strip()[-_LOG_CHARACTERS:]
    raise StartupError(f"llama.cpp's server {reason}; it said: {said or 'nothing'}")
