"""A step that is replayed gives the rows of the pass it replaces, and touches nothing else.

All but the graph itself runs here: elsewhere than on a GPU a recording is the recorded function.
"""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from numpy.random import default_rng
from tests.engine.architectures import ROPE, VARLEN, VOCABULARY, build
from tests.engine.harness import EngineHarness
from tests.engine.test_exactness import ragged_story
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.engine import attention
from cascade.engine.backends import cuda_graph, select
from cascade.engine.backends.base import RopeLengths
from cascade.engine.backends.cuda_graph import Bucket, CudaGraphRunner, StaticBatch
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import RaggedBatch, Segment
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import ForwardRequest, LogitsOutput
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from cascade.engine.backends.cuda_graph import Capture, Replay

TOLERANCE = 1e-4

ROWS = 1024  # of the pools

EXTENT = 192  # rows of each session

CAPTURED = EngineSettings(cache_tokens=1024, path=Path.CAPTURED)


def numbers(count: int, *, seed: int = 7) -> tuple[int, ...]:
    return tuple(default_rng(seed).integers(3, VOCABULARY, size=count).tolist())


class Twins:
    """Sessions that a captured runner and a flat one hold alike."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = ROWS,
        capture: Capture | None = None,
    ) -> None:
        self.plain = model
        self.captured = CudaGraphRunner(copy.deepcopy(model), capture=capture)
        self.flat = VarlenRunner(copy.deepcopy(model))
        self.tokens: dict[int, tuple[int, ...]] = {}
        for runner in (self.captured, self.flat):
            runner.resize(num_slots=rows)

    def open(self, *lengths: int) -> None:
        """Begin sessions of `lengths` tokens in passes of their own."""
        for place, length in enumerate(lengths):
            self.run({place: numbers(length, seed=place)}, rows=0)

    def step(self, *places: int) -> tuple[Tensor, Tensor]:
        """Append one token to each session; return both runners' rows."""
        seeds = [1000 * place + len(self.tokens[place]) for place in places]
        return self.run(
            {place: numbers(1, seed=seed) for place, seed in zip(places, seeds, strict=True)},
            rows=1,
        )

    def roll_back(self, place: int, *, count: int) -> None:
        """Drop a session's last tokens; their rows stay as they are."""
        self.tokens[place] = self.tokens[place][:-count]

    def run(self, new: dict[int, tuple[int, ...]], *, rows: int) -> tuple[Tensor, Tensor]:
        """Append tokens to sessions in one pass; return both runners' rows."""
        segments = [
            Segment(
                start=place * EXTENT,
                past=len(self.tokens.get(place, ())),
                tokens=tokens,
                num_logits=rows,
            )
            for place, tokens in new.items()
        ]
        for place, tokens in new.items():
            self.tokens[place] = (*self.tokens.get(place, ()), *tokens)
        with torch.inference_mode():
            return self.captured.forward(segments), self.flat.forward(segments)

    def expected(self, *places: int) -> Tensor:
        """Return the last row of a plain forward pass over each session."""
        with torch.inference_mode():
            return torch.stack(
                [
                    self.plain(input_ids=self._ids(place), use_cache=False).logits[0, -1]
                    for place in places
                ]
            )

    def _ids(self, place: int) -> Tensor:
        return torch.tensor([self.tokens[place]], device=self.plain.device)


def buckets(*shapes: tuple[int, int]) -> set[Bucket]:
    return {Bucket(sessions=sessions, keys=keys) for sessions, keys in shapes}


def states(runner: VarlenRunner) -> list[Tensor]:
    """Return a copy of all keys and values, `[H, R, D]` each."""
    layers = runner.pool._layers.values()  # pyright: ignore[reportPrivateUsage] - nobody reads all
    return [one.clone() for pair in layers for one in pair]


def agree(got_NV: Tensor, want_NV: Tensor) -> bool:
    assert got_NV.shape == want_NV.shape
    return bool(((got_NV - want_NV).abs().max() < TOLERANCE).item())


@pytest.mark.parametrize("name", VARLEN)
def test_replayed_rows_are_the_flat_and_the_plain_rows(name: str) -> None:
    """One to five sessions, across borders of sessions (4, 5) and of keys (127 to 129)."""
    twins = Twins(build(name))
    twins.open(126, 3, 40, 17, 80)

    for count in (1, 2, 3, 4, 5):
        places = range(count)
        got_NV, flat_NV = twins.step(*places)
        assert agree(got_NV, flat_NV)
        assert agree(got_NV, twins.expected(*places))

    assert len(twins.tokens[0]) == 131
    assert twins.captured.captured_buckets == buckets((1, 128), (2, 128), (4, 256), (8, 256))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "deepseek-v3"])
def test_a_bucket_serves_again_after_rollbacks_and_other_passes(name: str) -> None:
    twins = Twins(build(name))
    twins.open(30, 60, 9)
    twins.step(0, 1, 2)

    twins.roll_back(1, count=25)
    twins.roll_back(2, count=1)
    for order in ((2, 0, 1), (1, 2, 0)):
        got_NV, flat_NV = twins.step(*order)
        assert agree(got_NV, flat_NV)
        assert agree(got_NV, twins.expected(*order))
        got_NV, flat_NV = twins.run({0: numbers(5), 1: numbers(1)}, rows=1)
        assert agree(got_NV, flat_NV)

    assert twins.captured.captured_buckets == buckets((4, 128))


@pytest.mark.parametrize("name", VARLEN)
def test_an_engine_on_the_captured_path_gives_the_plain_rows(name: str) -> None:
    bench = EngineHarness(build(name), CAPTURED)

    ragged_story(bench)

    assert isinstance(bench.engine.runner, CudaGraphRunner)
    assert bench.engine.runner.captured_buckets
    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", ROPE)
def test_rope_that_follows_the_longest_position_is_never_captured(name: str) -> None:
    bench = EngineHarness(build(name), CAPTURED)

    for session, length in (("short", 20), ("long", 90)):
        bench.run_until_done(bench.submit(session, numbers(length), rows=1))
        bench.run_until_done(bench.submit(session, numbers(1), rows=1))

    assert isinstance(bench.engine.runner, CudaGraphRunner)
    assert not bench.engine.runner.captured_buckets
    assert bench.worst < TOLERANCE


def test_a_replay_writes_its_sessions_new_rows_and_scratch_alone() -> None:
    twins = Twins(build("llama"))
    twins.open(20, 127, 5)
    before = states(twins.captured)
    news = [place * EXTENT + len(twins.tokens[place]) for place in range(3)]

    twins.step(0, 1, 2)

    others_R = torch.ones(twins.captured.pool.num_slots, dtype=torch.bool)
    others_R[news] = False
    others_R[ROWS:] = False
    for old_HRD, new_HRD in zip(before, states(twins.captured), strict=True):
        assert torch.equal(old_HRD[:, others_R], new_HRD[:, others_R])
        assert not torch.equal(old_HRD[:, news], new_HRD[:, news])


def test_rows_outlive_the_next_replay() -> None:
    """A graph writes its logits where it wrote those before."""
    memory: dict[str, Tensor] = {}

    def capture(run: Replay) -> Replay:
        def replay() -> Tensor:
            return memory.setdefault("logits", run()).copy_(run())

        return replay

    twins = Twins(build("llama"), capture=capture)
    twins.open(20, 30)
    first_NV, flat_NV = twins.step(0, 1)
    twins.step(0, 1)

    assert agree(first_NV, flat_NV)


def test_a_new_pool_is_recorded_anew() -> None:
    twins = Twins(build("llama"))
    twins.open(20)
    twins.step(0)
    twins.captured.resize(num_slots=2 * ROWS)

    assert not twins.captured.captured_buckets
    assert twins.captured.pool.num_slots > 2 * ROWS


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(start=0, past=20, tokens=(5, 6), num_logits=2)],
        [Segment(start=0, past=20, tokens=(5,), num_logits=0)],
        [
            Segment(start=0, past=20, tokens=(5,), num_logits=1),
            Segment(start=EXTENT, past=0, tokens=(5, 6, 7), num_logits=1),
        ],
    ],
)
def test_other_passes_are_not_replayed(segments: list[Segment]) -> None:
    twins = Twins(build("llama"))
    twins.open(20)

    with torch.inference_mode():
        rows = twins.captured.forward(segments)

    assert len(rows) == sum(one.num_logits for one in segments)
    assert not twins.captured.captured_buckets


@pytest.mark.parametrize(("limit", "most"), [("MAX_SESSIONS", 2), ("MAX_KEYS", 256)])
def test_passes_above_the_largest_bucket_are_not_replayed(
    limit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, limit, most)
    twins = Twins(build("llama"))
    twins.open(20, 30, 40)

    got_NV, flat_NV = twins.step(0, 1, 2)
    assert agree(got_NV, flat_NV)
    assert not twins.captured.captured_buckets

    twins.step(0, 1)
    assert twins.captured.captured_buckets == buckets((2, 128))


def test_the_largest_bucket_fits_the_scratch_rows() -> None:
    """A graph runs over scratch rows alone before it is captured."""
    places = range(cuda_graph.MAX_SESSIONS // 2 + 1)
    alone: list[int] = []

    def capture(run: Replay) -> Replay:
        before = states(twins.captured)
        alone.append(len(run()))
        for old_HRD, new_HRD in zip(before, states(twins.captured), strict=True):
            assert torch.equal(old_HRD[:, :rows], new_HRD[:, :rows])
        return run

    rows = len(places) * EXTENT
    twins = Twins(build("llama"), rows=rows, capture=capture)
    twins.open(*(3 for _ in places))
    got_NV, flat_NV = twins.step(*places)

    assert alone == [cuda_graph.MAX_SESSIONS]
    assert agree(got_NV, flat_NV)
    assert twins.captured.captured_buckets == buckets((cuda_graph.MAX_SESSIONS, 128))


def test_a_capture_that_fails_leaves_the_flat_path_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[int] = []

    def fail(_: Replay) -> Replay:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    twins = Twins(build("llama"), capture=fail)
    twins.open(20, 30)
    with caplog.at_level(logging.WARNING):
        for places in ((0,), (0, 1), (1, 0)):
            got_NV, flat_NV = twins.step(*places)
            assert torch.equal(got_NV, flat_NV)

    assert len(tries) == 1
    assert len([one for one in caplog.records if "was not captured" in one.message]) == 1
    assert not twins.captured.captured_buckets


def test_buckets_recorded_before_a_failure_go_on() -> None:
    served: list[int] = []

    def capture(run: Replay) -> Replay:
        if served:
            raise torch.OutOfMemoryError
        served.append(1)
        return run

    twins = Twins(build("llama"), capture=capture)
    twins.open(20, 30, 40)
    for places in ((0, 1), (0, 1, 2), (1, 0)):
        got_NV, flat_NV = twins.step(*places)
        assert agree(got_NV, flat_NV)

    assert twins.captured.captured_buckets == buckets((2, 128))


@dataclass
class Greedy:
    """A head that writes the likeliest tokens after each session's prompt."""

    prompts: dict[str, tuple[int, ...]]
    length: int
    written: dict[str, list[int]] = field(default_factory=dict)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        return list(self._follow(outputs, logits_NV.argmax(-1).tolist()))

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        raise AssertionError(request) from error

    def _follow(self, ready: Sequence[LogitsOutput], tokens: list[int]) -> Iterator[ForwardRequest]:
        for one, token in zip(ready, tokens, strict=True):
            session = one.request.session
            written = self.written.setdefault(session, [])
            written.append(token)
            if len(written) == self.length:
                self.ended.release()
                continue
            base = len(self.prompts[session]) + len(written) - 1
            yield ForwardRequest(session=session, base=base, tokens=[token], num_logits=1)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_greedy_text_of_an_engine_is_that_of_transformers(name: str) -> None:
    model = build(name)
    lengths = {"a": 4, "b": 110, "c": 61}
    prompts = {one: numbers(length, seed=length) for one, length in lengths.items()}
    expected = {
        one: model.generate(  # pyright: ignore[reportCallIssue] - mixed into the class at run time
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for one, prompt in prompts.items()
    }
    head = Greedy(prompts=prompts, length=30)
    engine = Engine(adopt(model), handler=head, settings=CAPTURED)
    for one, prompt in prompts.items():
        engine.submit(ForwardRequest(session=SessionId(one), base=0, tokens=prompt, num_logits=1))
    engine.start()
    assert all(head.ended.acquire(timeout=60) for _ in prompts)
    engine.stop()

    assert head.written == expected
    assert isinstance(engine.runner, CudaGraphRunner)
    assert engine.runner.captured_buckets == buckets((4, 128), (4, 256))


def test_the_proof_at_load_replays() -> None:
    runner = select.select_runner(build("llama"), settings=CAPTURED)

    assert isinstance(runner, CudaGraphRunner)
    assert runner.captured_buckets == buckets((1, 128), (2, 128))


def test_a_replay_that_gives_wrong_rows_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(_: StaticBatch, query_THD: Tensor, *__: Any) -> Tensor:
        return query_THD

    monkeypatch.setattr(StaticBatch, "attend", unread)

    with pytest.raises(UnsupportedModel, match="captured path: its logits differ"):
        select.select_runner(build("llama"), settings=CAPTURED)


def test_deterministic_rows_are_not_to_be_had_here() -> None:
    settings = EngineSettings(path=Path.CAPTURED, deterministic=True)

    with pytest.raises(UnsupportedModel, match="captured path: its logits depend on the batch"):
        select.select_runner(build("llama"), settings=settings)


@pytest.mark.parametrize(
    ("device", "path", "tried"),
    [
        ("cuda", Path.AUTO, [Path.LEAN, Path.CAPTURED, Path.FLAT, Path.PADDED]),
        ("cpu", Path.AUTO, [Path.LEAN, Path.FLAT, Path.PADDED]),
        ("cuda", Path.FLAT, [Path.FLAT]),
        ("cpu", Path.CAPTURED, [Path.CAPTURED]),
    ],
)
def test_a_gpu_is_asked_for_graphs_first(device: str, path: Path, tried: list[Path]) -> None:
    model: Any = SimpleNamespace(device=torch.device(device))
    settings = EngineSettings(path=path, packed=False)

    assert [path for path, _ in select.paths(model, settings)] == tried


class Moves(TorchDispatchMode):
    """Notes every operator that has tensors of two devices or brings a number to one.

    On "meta" a read of a number fails by itself, as any of these would in a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        kinds = {one.device.type for one in tensors}
        self.seen.add(str(func))
        if len(kinds) > 1 or ("lift_fresh" in str(func) and "meta" in kinds):
            self.found.append(str(func))
        return out


def blind(name: str) -> Moves:
    """Run what is captured of four sessions where no number can be read."""
    recorded: list[Replay] = []

    def capture(run: Replay) -> Replay:
        recorded.append(run)
        return run

    model = build(name)
    runner = CudaGraphRunner(model, capture=capture)
    nn.Module.to(model, device="meta", dtype=torch.bfloat16)
    runner.device = torch.device("meta")
    runner.rope_lengths = RopeLengths()
    runner.resize(num_slots=ROWS)
    segments = [Segment(start=i * EXTENT, past=20, tokens=(5,), num_logits=1) for i in range(4)]
    with torch.inference_mode():
        assert runner.forward(segments).shape == (4, VOCABULARY)
        with Moves() as moves:
            recorded[0]()
    return moves


@pytest.mark.parametrize("name", VARLEN)
def test_what_is_captured_never_reads_the_device(name: str) -> None:
    moves = blind(name)

    assert "aten.index_copy_.default" in moves.seen
    assert not moves.found


def same_size(query_THD: Tensor, values_JRD: Tensor, params: attention.AttentionParams) -> bool:
    return not params.unfused and query_THD.shape[-1] == values_JRD.shape[-1]


@pytest.mark.parametrize("name", sorted(set(VARLEN) - {"gemma2", "gpt-oss", "deepseek-v3"}))
def test_with_flash_attention_neither(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_supports", same_size)

    moves = blind(name)

    assert "aten._flash_attention_forward.default" in moves.seen
    assert not moves.found


def test_a_read_of_the_device_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        blind("dynamic")


def test_flash_attention_is_told_of_the_same_rows_as_on_the_flat_path() -> None:
    places = ((0, 20), (EXTENT, 126), (2 * EXTENT, 3))
    segments = [
        Segment(start=start, past=past, tokens=(5,), num_logits=1) for start, past in places
    ]
    inputs_5N = torch.tensor([(5, past, start + past, start, past + 1) for start, past in places]).T
    flat = RaggedBatch(segments, device=torch.device("cpu"), num_slots=ROWS).varlen

    ours = StaticBatch(inputs_5N, keys=256, num_slots=ROWS).varlen

    assert all(torch.equal(one, other) for one, other in zip(ours[:3], flat[:3], strict=True))
    assert [one.dtype for one in ours[:3]] == [torch.int32] * 3
    assert (ours[3:], flat[3:]) == ((1, 256), (1, 127))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is what is tested")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gemma2"])
def test_a_graph_gives_the_flat_rows(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    nn.Module.to(model, device="cuda", dtype=dtype)
    twins = Twins(model)
    twins.open(126, 3, 40, 17, 80)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    for count in (1, 2, 3, 4, 5, 5, 3):
        got_NV, flat_NV = twins.step(*range(count))
        assert (got_NV - flat_NV).abs().max() < tolerance * flat_NV.abs().max()

    assert twins.captured.captured_buckets == buckets((1, 128), (2, 128), (4, 256), (8, 256))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is what is tested")
def test_a_replay_does_not_wait_for_the_device() -> None:
    model = build("llama")
    nn.Module.to(model, device="cuda", dtype=torch.bfloat16)
    runner = CudaGraphRunner(model)
    runner.resize(num_slots=ROWS)
    segments = [Segment(start=0, past=20, tokens=(5,), num_logits=1)]

    with torch.inference_mode():
        runner.forward(segments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner.forward(segments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert runner.captured_buckets == buckets((1, 128))
