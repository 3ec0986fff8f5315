"""Baselines: the same models, served by `transformers` alone.

Each answers the requests that our servers answer, greedily, with prompts rendered by the same chat
template, so that a benchmark can run all of them side by side:

* `Generate` with an `Assistance`: speculative decoding by `generate(assistant_model=...)`, one
  request at a time;
* `Generate` without: plain `generate` of the expert alone, over all requests that wait, padded;
* `Continuous`: the continuous batching of the expert alone.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
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

from cascade.benchmark.baseline_requests import GreedyRequest, Prompts
from cascade.engine import threads
from cascade.engine.model_loader import load
from cascade.errors import InvalidMeasurement, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.evaluation.client import CompletionResult
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

_PAGE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Assistance:
    """How `transformers` chooses the length of a draft."""

    tokens: int
    schedule: str = "constant"
    confidence: float = 0.0  # below it the assistant stops early

    def __str__(self) -> str:
        confidence = f", confidence {self.confidence:g}" if self.confidence else ""
        return f"{self.schedule} {self.tokens}{confidence}"


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
    """Both models as `transformers` loads them, and their prompts."""

    expert: PreTrainedModel
    drafter: PreTrainedModel
    prompts: Prompts
    threads: int = 0  # of torch, in the thread that generates; 0 leaves its default

    def request(self, body: Mapping[str, Any]) -> _Request:
        """Return a request body as tokens.

        Raises:
            InvalidMeasurement: The request is not greedy.
        """
        return _Request(prompts=self.prompts, asked=self.prompts.request(body))

    def generation_config(self, max_tokens: int) -> GenerationConfig:
        """Return a greedy configuration without any of the model's own values."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(self.prompts.stop_ids),
            pad_token_id=self.prompts.stop_ids[0] if self.prompts.stop_ids else 0,
            bos_token_id=None,
        )


def load_pair(settings: Application) -> Pair:
    """Return the pair that the settings name.

    Raises:
        UnsupportedModel: A model cannot be loaded.
    """
    models = {
        tier: load(own.model_path, device=settings.expert.engine.device, dtype=own.engine.dtype)
        for tier, own in (("expert", settings.expert), ("drafter", settings.drafter))
    }
    shared = settings.pair()
    return Pair(
        expert=models["expert"].model,
        drafter=models["drafter"].model,
        prompts=Prompts(tokenizer=shared.tokenizer, stop_ids=shared.stop_ids),
        threads=settings.expert.engine.threads,
    )


class Generate:
    """`generate` over the requests that wait when the last batch is done.

    Args:
        pair: The models.
        limit: Requests of a batch.
        assistance: Lets the drafter draft; `generate` then takes one request at a time.
    """

    def __init__(self, pair: Pair, *, limit: int = 1, assistance: Assistance | None = None) -> None:
        self.name = "transformers batched"
        if assistance is not None:
            self.name = f"transformers assisted ({assistance})"
        self._pair = pair
        self._limit = limit
        self._assistance = assistance
        self._waiting: list[_Request] = []
        self._worker: asyncio.Task[None] | None = None
        start = partial(threads.apply, threads=pair.threads)
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=start)

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the answer, when the whole batch has its answers.

        Raises:
            InvalidMeasurement: The request is not greedy.
        """
        request = self._pair.request(body)
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            try:
                outputs = await loop.run_in_executor(self._thread, self._generate, batch)
                for request, tokens in zip(batch, outputs, strict=True):
                    request.finish(tokens)
            except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
                for request in batch:
                    request.fail(error)
            # The clients that have their answers send their next requests before the next batch.
            await asyncio.sleep(0)

    def _generate(self, batch: Sequence[_Request]) -> list[list[int]]:
        """Return the tokens that `generate` adds to each prompt."""
        model, device = self._pair.expert, self._pair.expert.device
        config = self._pair.generation_config(max(one.asked.max_tokens for one in batch))
        prompts = [one.asked.prompt for one in batch]
        longest = max(map(len, prompts))
        ids = [(config.pad_token_id,) * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        drafter, own = self._pair.drafter, self._pair.drafter.generation_config
        assisted: Json = {}
        if self._assistance is not None:
            # `generate` writes the last draft length into the configuration: give it a copy.
            changed: Any = deepcopy(own)
            changed.num_assistant_tokens = self._assistance.tokens
            changed.num_assistant_tokens_schedule = self._assistance.schedule
            changed.assistant_confidence_threshold = self._assistance.confidence
            drafter.generation_config = changed
            assisted = {"assistant_model": drafter}
        generate: Callable[..., Tensor] = model.generate  # pyright: ignore[reportAssignmentType] - its stub is too wide
        try:
            with torch.inference_mode():
                outputs = generate(
                    torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_TokenClock(batch)]),
                    **assisted,
                )
        finally:
            drafter.generation_config = own
        return outputs[:, longest:].tolist()


class Continuous:
    """Continuous batching of the expert alone; made by `continuous`."""

    name = "transformers continuous batching"

    def __init__(self, pair: Pair, manager: Any) -> None:
        self._pair = pair
        self._manager = manager
        self._numbers = itertools.count()

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        """Return the answer.

        Raises:
            InvalidMeasurement: The request is not greedy.
            Unavailable: The library says that the request failed.
        """
        request = self._pair.request(body)

        def receive(output: Any) -> None:
            if output.error is None:
                times_s = output.timestamps or ()
                request.token_times_s += [time_s - request.began_s for time_s in times_s]
                request.finish(output.generated_tokens)
            else:
                message = f"transformers' continuous batching failed: {output.error}"
                request.fail(Unavailable(message))

        name = f"request {next(self._numbers)}"
        self._manager.register_result_handler(name, receive)
        self._manager.add_request(
            list(request.asked.prompt),
            request_id=name,
            max_new_tokens=request.asked.max_tokens,
            eos_token_id=list(self._pair.prompts.stop_ids),
            record_timestamps=True,
        )
        return await request.answer


@asynccontextmanager
async def continuous(pair: Pair, *, tokens: int) -> AsyncGenerator[Continuous]:
    """Run the continuous batching of the expert, with a cache of at least `tokens` tokens.

    Raises:
        InvalidMeasurement: The library refuses the model.
    """
    config = ContinuousBatchingConfig(
        num_blocks=-(-tokens // _PAGE_TOKENS), max_batch_tokens=_PAGE_TOKENS
    )
    try:
        manager = pair.expert.init_continuous_batching(  # pyright: ignore[reportCallIssue] - a mixin's
            generation_config=pair.generation_config(1), continuous_batching_config=config
        )
    except (ValueError, RuntimeError, AttributeError) as error:
        raise InvalidMeasurement(
            f"transformers' continuous batching does not run this model here: {error}"
        ) from error
    # The library's thread takes over the number of OpenMP threads of the thread that starts it.
    before = torch.get_num_threads()
    threads.apply(threads=pair.threads)
    try:
        manager.start()
    finally:
        torch.set_num_threads(before)
    try:
        yield Continuous(pair, manager)
    finally:
        await asyncio.to_thread(manager.stop, block=True)


@dataclass(slots=True, eq=False, kw_only=True)
class _Request:
    """A request to a baseline, and its answer."""

    prompts: Prompts
    asked: GreedyRequest
    began_s: float = field(default_factory=time.perf_counter)
    token_times_s: list[float] = field(default_factory=list[float])  # when each token came
    answer: asyncio.Future[CompletionResult] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def finish(self, tokens: Sequence[int]) -> None:
        """Answer with what was generated, unless nobody waits."""
        latency_s = time.perf_counter() - self.began_s
        if self.answer.cancelled():
            return
        self.answer.set_result(
            self.prompts.answer(
                self.asked,
                tokens,
                statistics={},
                latency_s=latency_s,
                ttft_s=self.token_times_s[0] if self.token_times_s else latency_s,
                chunk_times_s=tuple(self.token_times_s),
            )
        )

    def fail(self, error: Exception) -> None:
        """Let the wait for the answer raise, unless it is over."""
        if not self.answer.done():
            self.answer.set_exception(error)


class _TokenClock(StoppingCriteria):
    """Records when tokens come; it never stops anything."""

    def __init__(self, batch: Sequence[_Request]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        now_s = time.perf_counter()
        for request in self._batch:
            request.token_times_s.append(now_s - request.began_s)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
