"""A replayed decode step gives the logits of the pass that it replaces, and writes nothing else.

Everything but the graph itself runs on a CPU, where "capture" returns the function unchanged.
"""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from numpy.random import default_rng
from tests.engine.architectures import ROPE, VARLEN, VOCABULARY, build, with_slow
from tests.engine.harness import EngineHarness, GreedyHandler, ragged_scenario
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.engine import varlen_attn
from cascade.engine.backends import cuda_graph, select
from cascade.engine.backends.base import RopeLengths
from cascade.engine.backends.cuda_graph import Bucket, CudaGraphRunner, StaticBatch
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import RaggedBatch, Segment
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel
from cascade.types import SessionId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cascade.engine.attention import AttentionParams
    from cascade.engine.backends.cuda_graph import Capture, Replay

TOLERANCE = 1e-4

SLOTS = 1024  # of the pools

RANGE = 192  # slots of each session

CAPTURED = EngineSettings(cache_tokens=1024, path=Path.CAPTURED)

# One of each kind of attention; the others are in the slow suite.
_KINDS = {"llama", "qwen2 sliding", "gemma2", "gemma3", "gpt2", "mixtral", "gpt-oss", "deepseek-v3"}

FAMILIES = with_slow(VARLEN, fast=_KINDS)


def numbers(count: int, *, seed: int = 7) -> tuple[int, ...]:
    return tuple(default_rng(seed).integers(3, VOCABULARY, size=count).tolist())


class RunnerPair:
    """A `captured` and a `flat` runner with the same sessions."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int = SLOTS,
        capture: Capture | None = None,
    ) -> None:
        self.plain = model
        self.graphs = CudaGraphRunner(copy.deepcopy(model), capture=capture)
        self.varlen = VarlenRunner(copy.deepcopy(model))
        self.tokens: dict[int, tuple[int, ...]] = {}
        for runner in (self.graphs, self.varlen):
            runner.resize(num_slots=slots)

    def open(self, *lengths: int) -> None:
        """Open sessions of `lengths` tokens, each in its own pass."""
        for index, length in enumerate(lengths):
            self.run({index: numbers(length, seed=index)}, num_logits=0)

    def step(self, *indices: int) -> tuple[Tensor, Tensor]:
        """Append one token to each session; return both runners' logits."""
        seeds = [1000 * index + len(self.tokens[index]) for index in indices]
        return self.run(
            {index: numbers(1, seed=seed) for index, seed in zip(indices, seeds, strict=True)},
            num_logits=1,
        )

    def roll_back(self, index: int, *, count: int) -> None:
        """Drop a session's last tokens; their slots stay as they are."""
        self.tokens[index] = self.tokens[index][:-count]

    def run(self, new: dict[int, tuple[int, ...]], *, num_logits: int) -> tuple[Tensor, Tensor]:
        """Append tokens to sessions in one pass; return both runners' logits."""
        segments = [
            Segment(
                start=index * RANGE,
                past=len(self.tokens.get(index, ())),
                tokens=tokens,
                num_logits=num_logits,
            )
            for index, tokens in new.items()
        ]
        for index, tokens in new.items():
            self.tokens[index] = (*self.tokens.get(index, ()), *tokens)
        with torch.inference_mode():
            return self.graphs.forward(segments), self.varlen.forward(segments)

    def expected(self, *indices: int) -> Tensor:
        """Return the last logits of a plain forward pass over each session."""
        with torch.inference_mode():
            return torch.stack(
                [
                    self.plain(input_ids=self._ids(index), use_cache=False).logits[0, -1]
                    for index in indices
                ]
            )

    def _ids(self, index: int) -> Tensor:
        return torch.tensor([self.tokens[index]], device=self.plain.device)


def buckets(*shapes: tuple[int, int]) -> set[Bucket]:
    return {Bucket(sessions=sessions, keys=keys) for sessions, keys in shapes}


def states(runner: VarlenRunner) -> list[Tensor]:
    """Return a copy of all keys and values, `[H, R, D]` each."""
    layers = runner.pool._layers.values()  # pyright: ignore[reportPrivateUsage] - nobody reads all
    return [one.clone() for pair in layers for one in pair]


def agree(graph_NV: Tensor, want_NV: Tensor) -> bool:
    assert graph_NV.shape == want_NV.shape
    return bool(((graph_NV - want_NV).abs().max() < TOLERANCE).item())


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_logits_are_exact(name: str) -> None:
    """One to five sessions, across the limits of session (4, 5) and key (127 to 129) buckets."""
    runners = RunnerPair(build(name))
    runners.open(126, 3, 40, 17, 80)

    for count in (1, 2, 3, 4, 5):
        indices = range(count)
        graph_NV, varlen_NV = runners.step(*indices)
        assert agree(graph_NV, varlen_NV)
        assert agree(graph_NV, runners.expected(*indices))

    assert len(runners.tokens[0]) == 131
    assert runners.graphs.captured_buckets == buckets((1, 128), (2, 128), (4, 256), (8, 256))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "deepseek-v3"])
def test_a_graph_is_reused_after_rollbacks_and_other_passes(name: str) -> None:
    runners = RunnerPair(build(name))
    runners.open(30, 60, 9)
    runners.step(0, 1, 2)

    runners.roll_back(1, count=25)
    runners.roll_back(2, count=1)
    for order in ((2, 0, 1), (1, 2, 0)):
        graph_NV, varlen_NV = runners.step(*order)
        assert agree(graph_NV, varlen_NV)
        assert agree(graph_NV, runners.expected(*order))
        graph_NV, varlen_NV = runners.run({0: numbers(5), 1: numbers(1)}, num_logits=1)
        assert agree(graph_NV, varlen_NV)

    assert runners.graphs.captured_buckets == buckets((4, 128))


@pytest.mark.parametrize("name", with_slow(VARLEN, fast=("llama", "gemma3", "deepseek-v3")))
def test_the_captured_path_is_exact(name: str) -> None:
    harness = EngineHarness(build(name), CAPTURED)

    ragged_scenario(harness)

    assert isinstance(harness.engine.runner, CudaGraphRunner)
    assert harness.engine.runner.captured_buckets
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", ROPE)
def test_rope_that_follows_the_longest_position_is_never_captured(name: str) -> None:
    harness = EngineHarness(build(name), CAPTURED)

    for session, length in (("short", 20), ("long", 90)):
        harness.run(session, numbers(length))
        harness.run(session, numbers(1))

    assert isinstance(harness.engine.runner, CudaGraphRunner)
    assert not harness.engine.runner.captured_buckets
    assert harness.worst < TOLERANCE


def test_a_replay_writes_only_new_slots_and_scratch() -> None:
    runners = RunnerPair(build("llama"))
    runners.open(20, 127, 5)
    before = states(runners.graphs)
    new_slots = [index * RANGE + len(runners.tokens[index]) for index in range(3)]

    runners.step(0, 1, 2)

    other_R = torch.ones(runners.graphs.pool.num_slots, dtype=torch.bool)
    other_R[new_slots] = False
    other_R[SLOTS:] = False
    for old_HRD, new_HRD in zip(before, states(runners.graphs), strict=True):
        assert torch.equal(old_HRD[:, other_R], new_HRD[:, other_R])
        assert not torch.equal(old_HRD[:, new_slots], new_HRD[:, new_slots])


def test_logits_are_not_overwritten_by_the_next_replay() -> None:
    """A graph writes its logits to the same memory each time."""
    memory: dict[str, Tensor] = {}

    def capture(run: Replay) -> Replay:
        def replay() -> Tensor:
            return memory.setdefault("logits", run()).copy_(run())

        return replay

    runners = RunnerPair(build("llama"), capture=capture)
    runners.open(20, 30)
    first_NV, varlen_NV = runners.step(0, 1)
    runners.step(0, 1)

    assert agree(first_NV, varlen_NV)


def test_resizing_the_pool_drops_the_graphs() -> None:
    runners = RunnerPair(build("llama"))
    runners.open(20)
    runners.step(0)
    runners.graphs.resize(num_slots=2 * SLOTS)

    assert not runners.graphs.captured_buckets
    assert runners.graphs.pool.num_slots > 2 * SLOTS


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(start=0, past=20, tokens=(5, 6), num_logits=2)],
        [Segment(start=0, past=20, tokens=(5,), num_logits=0)],
        [
            Segment(start=0, past=20, tokens=(5,), num_logits=1),
            Segment(start=RANGE, past=0, tokens=(5, 6, 7), num_logits=1),
        ],
    ],
)
def test_other_passes_are_not_replayed(segments: list[Segment]) -> None:
    runners = RunnerPair(build("llama"))
    runners.open(20)

    with torch.inference_mode():
        logits_NV = runners.graphs.forward(segments)

    assert len(logits_NV) == sum(one.num_logits for one in segments)
    assert not runners.graphs.captured_buckets


@pytest.mark.parametrize(("limit", "most"), [("MAX_SESSIONS", 2), ("MAX_KEYS", 256)])
def test_passes_above_the_largest_bucket_are_not_replayed(
    limit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, limit, most)
    runners = RunnerPair(build("llama"))
    runners.open(20, 30, 40)

    graph_NV, varlen_NV = runners.step(0, 1, 2)
    assert agree(graph_NV, varlen_NV)
    assert not runners.graphs.captured_buckets

    runners.step(0, 1)
    assert runners.graphs.captured_buckets == buckets((2, 128))


def test_the_largest_bucket_fits_the_scratch_slots() -> None:
    """Before its capture a graph runs only over scratch slots."""
    indices = range(cuda_graph.MAX_SESSIONS // 2 + 1)
    scratch_runs: list[int] = []

    def capture(run: Replay) -> Replay:
        before = states(runners.graphs)
        scratch_runs.append(len(run()))
        for old_HRD, new_HRD in zip(before, states(runners.graphs), strict=True):
            assert torch.equal(old_HRD[:, :slots], new_HRD[:, :slots])
        return run

    slots = len(indices) * RANGE
    runners = RunnerPair(build("llama"), slots=slots, capture=capture)
    runners.open(*(3 for _ in indices))
    graph_NV, varlen_NV = runners.step(*indices)

    assert scratch_runs == [cuda_graph.MAX_SESSIONS]
    assert agree(graph_NV, varlen_NV)
    assert runners.graphs.captured_buckets == buckets((cuda_graph.MAX_SESSIONS, 128))


def test_after_a_failed_capture_the_flat_path_serves_all_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts: list[int] = []

    def fail(_: Replay) -> Replay:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    runners = RunnerPair(build("llama"), capture=fail)
    runners.open(20, 30)
    with caplog.at_level(logging.WARNING):
        for indices in ((0,), (0, 1), (1, 0)):
            graph_NV, varlen_NV = runners.step(*indices)
            assert torch.equal(graph_NV, varlen_NV)

    assert len(attempts) == 1
    assert len([one for one in caplog.records if "was not captured" in one.message]) == 1
    assert not runners.graphs.captured_buckets


def test_buckets_captured_before_a_failure_are_still_used() -> None:
    captures: list[int] = []

    def capture(run: Replay) -> Replay:
        if captures:
            raise torch.OutOfMemoryError
        captures.append(1)
        return run

    runners = RunnerPair(build("llama"), capture=capture)
    runners.open(20, 30, 40)
    for indices in ((0, 1), (0, 1, 2), (1, 0)):
        graph_NV, varlen_NV = runners.step(*indices)
        assert agree(graph_NV, varlen_NV)

    assert runners.graphs.captured_buckets == buckets((2, 128))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model = build(name)
    lengths = {"a": 4, "b": 110, "c": 61}
    prompts = {one: numbers(length, seed=length) for one, length in lengths.items()}
    expected = {
        one: model.generate(  # pyright: ignore[reportCallIssue] - mixed into the class at run time
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for one, prompt in prompts.items()
    }
    handler = GreedyHandler(length=30)
    engine = Engine(adopt(model), handler=handler, settings=CAPTURED)
    for one, prompt in prompts.items():
        engine.submit(
            ForwardRequest(
                share=NOBODYS, session=SessionId(one), base=0, tokens=prompt, num_logits=1
            )
        )
    engine.start()
    assert all(handler.ended.acquire(timeout=60) for _ in prompts)
    engine.stop()

    assert handler.generated == expected
    assert isinstance(engine.runner, CudaGraphRunner)
    assert engine.runner.captured_buckets == buckets((4, 128), (4, 256))


def test_the_check_at_load_replays_graphs() -> None:
    runner = select.select_runner(build("llama"), settings=CAPTURED)

    assert isinstance(runner, CudaGraphRunner)
    assert runner.captured_buckets == buckets((1, 128), (2, 128))


def test_a_replay_with_wrong_logits_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_attention(_: StaticBatch, query_THD: Tensor, *__: Any) -> Tensor:
        return query_THD

    monkeypatch.setattr(StaticBatch, "attend", without_attention)

    with pytest.raises(UnsupportedModel, match="captured path: its logits differ"):
        select.select_runner(build("llama"), settings=CAPTURED)


def test_the_captured_path_is_not_deterministic() -> None:
    settings = EngineSettings(path=Path.CAPTURED, deterministic=True)

    with pytest.raises(UnsupportedModel, match="captured path: its logits depend on the batch"):
        select.select_runner(build("llama"), settings=settings)


@pytest.mark.parametrize(
    ("device", "path", "tried"),
    [
        ("cuda", Path.AUTO, [Path.LEAN, Path.CAPTURED, Path.FLAT, Path.PADDED, Path.PADDED]),
        ("cpu", Path.AUTO, [Path.LEAN, Path.FLAT, Path.PADDED, Path.PADDED]),
        ("cuda", Path.FLAT, [Path.FLAT]),
        ("cpu", Path.CAPTURED, [Path.CAPTURED]),
    ],
)
def test_paths_are_tried_fastest_first(device: str, path: Path, tried: list[Path]) -> None:
    config = SimpleNamespace(is_encoder_decoder=False)
    model: Any = SimpleNamespace(device=torch.device(device), config=config)
    settings = EngineSettings(path=path, packed=False)

    assert [path for path, _ in select.paths(model, settings)] == tried


class DeviceReads(TorchDispatchMode):
    """Records every operator that has tensors of two devices or copies a number to one.

    Any of these would fail in a capture. On "meta" reading a number fails anyway.
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


def run_on_meta(name: str) -> DeviceReads:
    """Run a bucket of four sessions on a device where no number can be read."""
    captured: list[Replay] = []

    def capture(run: Replay) -> Replay:
        captured.append(run)
        return run

    model = build(name)
    runner = CudaGraphRunner(model, capture=capture)
    nn.Module.to(model, device="meta", dtype=torch.bfloat16)
    runner.device = torch.device("meta")
    runner.rope_lengths = RopeLengths()
    runner.resize(num_slots=SLOTS)
    segments = [Segment(start=i * RANGE, past=20, tokens=(5,), num_logits=1) for i in range(4)]
    with torch.inference_mode():
        assert runner.forward(segments).shape == (4, VOCABULARY)
        with DeviceReads() as reads:
            captured[0]()
    return reads


@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_pass_never_reads_the_device(name: str) -> None:
    reads = run_on_meta(name)

    assert "aten.index_copy_.default" in reads.seen
    assert not reads.found


def same_size(
    batch: varlen_attn.Batch, query_THD: Tensor, values_JRD: Tensor, params: AttentionParams
) -> bool:
    del batch
    return not params.unfused and query_THD.shape[-1] == values_JRD.shape[-1]


@pytest.mark.parametrize(
    "name", [one for one in FAMILIES if one not in ("gemma2", "gpt-oss", "deepseek-v3")]
)
def test_torchs_attention_in_a_captured_pass_never_reads_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attn, "supported", same_size)

    reads = run_on_meta(name)

    assert "torch_attn._varlen_attn.default" in reads.seen
    assert not reads.found


def test_a_read_of_the_device_is_detected() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        run_on_meta("dynamic")


def test_torchs_attention_gets_the_same_arguments_as_on_the_flat_path() -> None:
    starts = ((0, 20), (RANGE, 126), (2 * RANGE, 3))
    segments = [
        Segment(start=start, past=past, tokens=(5,), num_logits=1) for start, past in starts
    ]
    inputs_5N = torch.tensor([(5, past, start + past, start, past + 1) for start, past in starts]).T
    flat = RaggedBatch(segments, device=torch.device("cpu"), num_slots=SLOTS).extents

    ours = StaticBatch(inputs_5N, keys=256, num_slots=SLOTS).extents

    assert all(torch.equal(one, other) for one, other in zip(ours[:3], flat[:3], strict=True))
    assert [one.dtype for one in ours[:3]] == [torch.int32] * 3
    assert (ours[3:], flat[3:]) == ((1, 256, None), (1, 127, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gemma2"])
def test_a_cuda_graph_gives_the_logits_of_the_flat_path(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    nn.Module.to(model, device="cuda", dtype=dtype)
    runners = RunnerPair(model)
    runners.open(126, 3, 40, 17, 80)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    for count in (1, 2, 3, 4, 5, 5, 3):
        graph_NV, varlen_NV = runners.step(*range(count))
        assert (graph_NV - varlen_NV).abs().max() < tolerance * varlen_NV.abs().max()

    assert runners.graphs.captured_buckets == buckets((1, 128), (2, 128), (4, 256), (8, 256))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_does_not_wait_for_the_device() -> None:
    model = build("llama")
    nn.Module.to(model, device="cuda", dtype=torch.bfloat16)
    runner = CudaGraphRunner(model)
    runner.resize(num_slots=SLOTS)
    segments = [Segment(start=0, past=20, tokens=(5,), num_logits=1)]

    with torch.inference_mode():
        runner.forward(segments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner.forward(segments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert runner.captured_buckets == buckets((1, 128))
