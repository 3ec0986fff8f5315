"""Peers: the same models, served by `transformers` alone.

Each answers the requests that our servers answer, greedily, with the prompts rendered by the same
chat template, so that a benchmark can run all of them side by side:

* `Assisted`: `generate(assistant_model=...)`, speculative decoding of one request at a time;
* `Batched`: plain `generate` of the expert alone, over all requests that wait, padded;
* `Continuous`: the continuous batching of the expert alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cascade.engine import threads, tokenizer
from cascade.engine.model_loader import load
from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.tokenizer import Tokenizer

Json: TypeAlias = dict[str, Any]

_PAGE_TOKENS = 256

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Assistance:
    """How `transformers` chooses the length of a draft."""

    tokens: int
    schedule: str = "constant"
    confidence: float = 0.0  # below it the assistant stops early

    @property
    def name(self) -> str:
        """Return a short description."""
        sure = f", confidence {self.confidence:g}" if self.confidence else ""
        return f"{self.schedule} {self.tokens}{sure}"


# Fixed lengths; the library's own two schedules; and its default, with the early stop it has.
ASSISTANCE = (
    *(Assistance(tokens=tokens) for tokens in (2, 3, 4, 5, 6, 8)),
    Assistance(tokens=5, schedule="heuristic"),
    Assistance(tokens=5, schedule="heuristic_transient"),
    Assistance(tokens=8, confidence=0.4),
    Assistance(tokens=20, confidence=0.4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both models as `transformers` loads them, and the words they share."""

    expert: PreTrainedModel
    drafter: PreTrainedModel
    words: Tokenizer
    stop_ids: tuple[int, ...]
    threads: int = 0  # of torch, in the thread that generates; 0 leaves its default

    def prompt(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens of a request; raises InvalidMeasurement for one that is not greedy."""
        if body.get("temperature") != 0:
            raise InvalidMeasurement("peers answer greedily; set the temperature to 0")
        if "messages" in body:
            return self.words.chat(body["messages"])
        prompt: Any = body["prompt"]
        return self.words.encode(prompt) if isinstance(prompt, str) else tuple(prompt)

    def settings(self, max_tokens: int) -> GenerationConfig:
        """Return greedy settings with nothing of a model's own."""
        ends = list(self.stop_ids)
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,
            bos_token_id=None,
        )


def load_pair(  # noqa: PLR0913 - both models, and where they run
    *,
    drafter: str,
    expert: str,
    device: str = "auto",
    drafter_dtype: str = "auto",
    expert_dtype: str = "auto",
    threads: int = 0,
) -> Pair:
    """Return a pair for peers; raises UnsupportedModel."""
    judge = load(expert, device=device, dtype=expert_dtype)
    words = tokenizer.load(expert)
    return Pair(
        expert=judge.model,
        drafter=load(drafter, device=device, dtype=drafter_dtype).model,
        words=words,
        stop_ids=tuple(dict.fromkeys((*words.stop_ids, *judge.stop_ids))),
        threads=threads,
    )


class Assisted:
    """`generate(assistant_model=...)`: one request at a time, the others wait."""

    def __init__(self, pair: Pair, assistance: Assistance) -> None:
        self.name = f"transformers assisted ({assistance.name})"
        self._pair = pair
        self._assistance = assistance
        self._own: Any = deepcopy(pair.drafter.generation_config)
        self._thread = _thread(pair)

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the answer."""
        waiting = _Waiting(body=dict(body), prompt=self._pair.prompt(body))
        await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, waiting)
        return waiting.answer(self._pair)

    def _generate(self, waiting: _Waiting) -> None:
        settings = self._pair.settings(waiting.max_tokens)
        ids = torch.tensor([waiting.prompt], device=self._pair.expert.device)
        with _assistant(self._pair.drafter, self._own, self._assistance):
            found = _generated(
                self._pair.expert, ids, settings, [waiting], assistant_model=self._pair.drafter
            )
        waiting.take(found[0], self._pair.stop_ids)


class Batched:
    """Plain `generate` of the expert over all requests that wait when the last batch is done."""

    def __init__(self, pair: Pair, *, limit: int) -> None:
        self.name = "transformers batched"
        self._pair = pair
        self._limit = limit
        self._waiting: list[_Waiting] = []
        self._thread = _thread(pair)
        self._running = False

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the answer, with those of all others in the batch."""
        waiting = _Waiting(body=dict(body), prompt=self._pair.prompt(body))
        self._waiting.append(waiting)
        # Let all that start in this tick come in before the first batch leaves.
        await asyncio.sleep(0)
        await self._take_turns(waiting)
        return waiting.answer(self._pair)

    async def _take_turns(self, mine: _Waiting) -> None:
        while mine.ended_s is None:
            if self._running:
                await mine.done.wait()
                mine.done.clear()
                continue
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            self._running = True
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._generate, batch
                )
            finally:
                self._running = False
                for one in (*batch, *self._waiting[:1]):
                    one.done.set()

    def _generate(self, batch: Sequence[_Waiting]) -> None:
        longest = max(len(one.prompt) for one in batch)
        settings = self._pair.settings(max(one.max_tokens for one in batch))
        device = self._pair.expert.device
        pad: Any = settings.pad_token_id
        rows = [(pad,) * (longest - len(one.prompt)) + one.prompt for one in batch]
        mask = [[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in batch]
        found = _generated(
            self._pair.expert,
            torch.tensor(rows, device=device),
            settings,
            batch,
            attention_mask=torch.tensor(mask, device=device),
        )
        for one, tokens in zip(batch, found, strict=True):
            one.take(tokens, self._pair.stop_ids)


class Continuous:
    """Continuous batching of the expert alone; made by `continuous`."""

    name = "transformers continuous batching"

    def __init__(self, pair: Pair, manager: Any) -> None:
        self._pair = pair
        self._manager = manager
        self._loop = asyncio.get_running_loop()
        self._futures: dict[str, asyncio.Future[Any]] = {}
        self._lock = threading.Lock()

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        """Return the answer.

        Raises:
            Unavailable: The library says that the request failed.
        """
        waiting = _Waiting(body=dict(body), prompt=self._pair.prompt(body))
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._lock:
            name: str = self._manager.add_request(
                list(waiting.prompt),
                max_new_tokens=waiting.max_tokens,
                eos_token_id=list(self._pair.stop_ids),
                record_timestamps=True,
            )
            self._futures[name] = future
        output = await future
        if output.error is not None:
            raise Unavailable(f"transformers' continuous batching failed: {output.error}")
        waiting.marks_s = [time_s - waiting.began_s for time_s in output.timestamps or ()]
        waiting.take(output.generated_tokens, self._pair.stop_ids)
        return waiting.answer(self._pair)

    def deliver(self) -> None:
        """Hand one finished output to whoever waits for it, if there is one soon."""
        output = self._manager.get_result(timeout=_POLL_S)
        if output is None or not output.is_finished():
            return
        with self._lock:
            future = self._futures.pop(output.request_id)
        self._loop.call_soon_threadsafe(future.set_result, output)


@asynccontextmanager
async def continuous(pair: Pair, *, tokens: int) -> AsyncGenerator[Continuous]:
    """Run the continuous batching of the expert, with a cache of at least `tokens` tokens.

    Raises:
        InvalidMeasurement: The library refuses the model.
    """
    settings = ContinuousBatchingConfig(
        num_blocks=-(-tokens // _PAGE_TOKENS), max_batch_tokens=_PAGE_TOKENS
    )
    try:
        manager = pair.expert.init_continuous_batching(  # pyright: ignore[reportCallIssue] - a mixin's
            generation_config=pair.settings(1), continuous_batching_config=settings
        )
    except (ValueError, RuntimeError, AttributeError) as error:
        raise InvalidMeasurement(
            f"transformers' continuous batching does not run this model here: {error}"
        ) from error
    with _own_threads(pair):
        manager.start()
    peer = Continuous(pair, manager)
    stopped = threading.Event()
    delivery = asyncio.create_task(asyncio.to_thread(_deliver, peer, stopped))
    try:
        yield peer
    finally:
        stopped.set()
        await delivery
        await asyncio.to_thread(manager.stop, block=True)


def _deliver(peer: Continuous, stopped: threading.Event) -> None:
    while not stopped.is_set():
        peer.deliver()


@dataclass(slots=True, eq=False, kw_only=True)
class _Waiting:
    """A request on its way through a peer."""

    body: Json
    prompt: tuple[int, ...]
    began_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    tokens: tuple[int, ...] = ()
    marks_s: list[float] = field(default_factory=list[float])  # when tokens came
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    def take(self, tokens: Sequence[int], stop_ids: Sequence[int]) -> None:
        """Note the answer: up to its length, or to the first token that ends it."""
        kept = list(tokens)[: self.max_tokens]
        ends = (place + 1 for place, token in enumerate(kept) if token in stop_ids)
        self.tokens = tuple(kept[: next(ends, len(kept))])
        self.ended_s = time.perf_counter()

    def answer(self, pair: Pair) -> Answer:
        """Return what a client would see."""
        assert self.ended_s is not None, "take first"
        latency_s = self.ended_s - self.began_s
        stopped = bool(self.tokens) and self.tokens[-1] in pair.stop_ids
        return Answer(
            text=pair.words.decode(self.tokens),
            finish="stop" if stopped else "length",
            statistics={},
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            latency_s=latency_s,
            ttft_s=self.marks_s[0] if self.marks_s else latency_s,
            marks_s=tuple(self.marks_s),
        )


class _Clock(StoppingCriteria):
    """Notes when tokens come; it never stops anything."""

    def __init__(self, batch: Sequence[_Waiting]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        now_s = time.perf_counter()
        for one in self._batch:
            one.marks_s.append(now_s - one.began_s)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generated(
    model: PreTrainedModel,
    ids: Tensor,
    settings: GenerationConfig,
    batch: Sequence[_Waiting],
    **more: Any,
) -> list[list[int]]:
    """Return what `generate` adds to each row."""
    generate: Callable[..., Tensor] = model.generate  # pyright: ignore[reportAssignmentType] - its stub is too wide
    with torch.inference_mode():
        rows = generate(
            ids,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_Clock(batch)]),
            **more,
        )
    return rows[:, ids.shape[1] :].tolist()


@contextmanager
def _assistant(model: Any, own: Any, assistance: Assistance) -> Generator[None]:
    """Let the assistant draft so; `generate` changes its settings, so they are put back after."""
    chosen = deepcopy(own)
    chosen.num_assistant_tokens = assistance.tokens
    chosen.num_assistant_tokens_schedule = assistance.schedule
    chosen.assistant_confidence_threshold = assistance.confidence
    model.generation_config = chosen
    try:
        yield
    finally:
        model.generation_config = own


def _thread(pair: Pair) -> ThreadPoolExecutor:
    """Return one thread with the pair's number of OpenMP threads behind it."""
    begin = partial(threads.apply, threads=pair.threads)
    return ThreadPoolExecutor(max_workers=1, initializer=begin)


@contextmanager
def _own_threads(pair: Pair) -> Generator[None]:
    """Let a thread that the library starts within have the pair's number of OpenMP threads."""
    before = torch.get_num_threads()
    threads.apply(threads=pair.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
