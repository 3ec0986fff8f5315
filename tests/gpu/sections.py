"""The sections of the GPU report. Each yields its findings; one with a false `ok` is a defect.

On a CPU the same code runs with tiny sizes, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import importlib.util
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from tests.engine.architectures import build as build_tiny
from tests.engine.harness import EngineHarness, Received, ragged_scenario

from cascade import demo
from cascade.benchmark.synthetic_model import ModelShape, build, shape_for
from cascade.engine import varlen_attn
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.batch import IN_PLACE
from cascade.engine.model_loader import LoadedModel, adopt, read_config
from cascade.engine.settings import EngineSettings
from cascade.engine.settings import Path as ModelPath
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

Finding: TypeAlias = dict[str, Any]

# Of the largest logit of a row: the median, since a mixture of experts may choose others anywhere.
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}

ARCHITECTURES = (
    *("llama", "qwen3", "gemma3", "gemma2", "gpt-oss", "deepseek-v3", "mixtral"),
    *("mistral sliding", "gpt2", "phi3"),
)
PADDED = ("llama", "falcon alibi", "bloom", "llama4")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    device: str
    dtype: torch.dtype
    architectures: tuple[str, ...]
    padded: tuple[str, ...]
    sizes: dict[str, int | ModelShape]  # small, medium, large: parameters or sizes
    sessions: tuple[int, ...] = (1, 4, 16, 64)
    context_tokens: int = 250
    cache_tokens: int = 64 * 512
    passes: int = 20
    bandwidth_bytes: int = 4 * GIB
    answer_tokens: int = 96
    streams: tuple[int, ...] = (1, 16)

    @property
    def dtype_name(self) -> Any:
        """The type, as settings name it."""
        return str(self.dtype).removeprefix("torch.")

    def shape(self, size: str) -> ModelShape:
        """Return the sizes of a model of the shipped expert's kind."""
        found = self.sizes[size]
        if isinstance(found, int):
            return shape_for(found, read_config(str(demo.EXPERT)))
        return found

    def engine(self, **more: Any) -> EngineSettings:
        """Return the settings of an engine."""
        plain: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype_name,
            "cache_tokens": self.cache_tokens,
        }
        return EngineSettings(**plain | more)

    def model(self, size: str) -> LoadedModel:
        """Return a cost-padded model."""
        shape = self.shape(size)
        return adopt(build(str(demo.EXPERT), shape=shape, device=self.device, dtype=self.dtype))


def scale_of(device: str) -> Scale:
    """Return the sizes for a device."""
    if not device.startswith("cpu"):
        return Scale(
            device=device,
            dtype=torch.bfloat16,
            architectures=ARCHITECTURES,
            padded=PADDED,
            sizes={"small": 500_000_000, "medium": 7_000_000_000, "large": 30_000_000_000},
        )
    sizes = {"hidden": 384, "intermediate": 1024, "heads": 6, "groups": 6}
    return Scale(
        device=device,
        dtype=torch.float32,
        architectures=("llama", "gemma2", "deepseek-v3"),
        padded=("falcon alibi",),
        sizes={
            name: ModelShape(**sizes, layers=layers)
            for name, layers in {"small": 6, "medium": 7, "large": 8}.items()
        },
        sessions=(1, 3),
        context_tokens=20,
        cache_tokens=4096,
        passes=2,
        bandwidth_bytes=64 * 2**20,
        answer_tokens=12,
        streams=(1, 2),
    )


def device(scale: Scale, _: float) -> Iterator[Finding]:
    """Yield what runs here."""
    found: Finding = {
        "device": scale.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention_in_place": IN_PLACE,
        "flashinfer": importlib.util.find_spec("flashinfer") is not None,
        "read_gb_per_s": round(read_bandwidth(scale) / 1e9, 1),
    }
    if scale.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(scale.device)
        found |= {"name": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)}
    yield found


def paths(scale: Scale, limit_s: float) -> Iterator[Finding]:
    """Yield how far each path's logits are from those of a CPU in float32 with the same weights."""
    end_s = time.monotonic() + limit_s
    runs = [
        (name, path, dtype, False)
        for name in scale.architectures
        for path, dtype in (
            (ModelPath.CAPTURED, torch.bfloat16),
            (ModelPath.FLAT, torch.bfloat16),
            (ModelPath.FLAT, torch.float32),
        )
    ]
    runs += [(name, ModelPath.PADDED, torch.bfloat16, False) for name in scale.padded]
    runs.append((scale.architectures[0], ModelPath.FLAT, torch.bfloat16, True))
    for name, path, dtype, deterministic in runs:
        what: Finding = {"model": name, "path": path.value, "dtype": str(dtype)}
        what |= {"deterministic": True} if deterministic else {}
        if time.monotonic() > end_s:
            yield {**what, "left_out": True}
            continue
        try:
            yield what | logits_error(
                name, scale.device, path=path, dtype=dtype, deterministic=deterministic
            )
        except UnsupportedModel as error:  # a device may have no batch-invariant kernels
            yield {**what, "ok": deterministic, "refused": error.message}
        # One path's defect must not hide the others.
        except Exception as error:  # noqa: BLE001 - as above
            yield {**what, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


def logits_error(
    name: str, device: str, *, path: ModelPath, dtype: torch.dtype, deterministic: bool = False
) -> Finding:
    """Run the ragged scenario of the engine's tests on a device.

    Args:
        name: One of `tests.engine.architectures`.
        device: Where the engine runs.
        path: Its path.
        dtype: The type of the weights there; on the CPU they are the same, in float32.
        deterministic: Logits must not depend on the batch.
    """
    reference = build_tiny(name)
    for weight in reference.parameters():
        weight.data = weight.data.to(dtype).float()
    model = on_device(reference, device, dtype)
    ids = torch.tensor([[(7 * i + 3) % 200 for i in range(90)]])
    with torch.inference_mode():
        plain_TV = model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()
        exact_TV = reference(input_ids=ids, use_cache=False).logits[0]
    kernel_calls, attend = 0, varlen_attn.attend

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal kernel_calls
        kernel_calls += 1
        return attend(*args, **kwargs)

    varlen_attn.attend = counted
    try:
        settings = EngineSettings(cache_tokens=1024, path=path, deterministic=deterministic)
        harness = RelativeErrors(reference, settings, loaded=adopt(model))
        ragged_scenario(harness)
    finally:
        varlen_attn.attend = attend
    runner, errors_N = harness.engine.runner, torch.tensor(harness.errors)
    graphs = len(runner.captured_buckets) if isinstance(runner, CudaGraphRunner) else 0
    return {
        "ok": bool(errors_N.median() <= TOLERANCE[dtype]),
        "median": float(errors_N.median()),
        "worst": float(errors_N.max()),
        "plain_median": float(relative(plain_TV, exact_TV).median()),
        "rows": len(errors_N),
        "kernel_calls": kernel_calls,  # of torch's variable-length attention, graphs' replays apart
        "graphs": graphs,
    }


def on_device(model: PreTrainedModel, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy whose weights have another type; rotations stay in float32, as when loaded."""
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.data = weight.data.to(dtype)
    torch.nn.Module.to(copied, device)
    return copied


def relative(actual_NV: torch.Tensor, expected_NV: torch.Tensor) -> torch.Tensor:
    """Return the largest error of each row, over its largest logit."""
    return (actual_NV - expected_NV).abs().amax(1) / expected_NV.abs().amax(1)


class RelativeErrors(EngineHarness):
    """Keeps the error of every row."""

    errors: list[float]

    def check(self, received: Received) -> None:
        super().check(received)
        self.errors = getattr(self, "errors", [])
        if received.logits:
            expected_NV = self.plain_logits(received.context, count=len(received.logits))
            actual_NV = torch.stack(received.logits).float()
            self.errors += relative(actual_NV, expected_NV).tolist()


def graphs(scale: Scale, _: float) -> Iterator[Finding]:
    """Yield the time of a step that drafts one token per session, with CUDA graphs and without."""
    from cascade.benchmark.microbench import StepBenchmark  # noqa: PLC0415 - needs more wheels

    def shipped() -> LoadedModel:
        config = read_config(str(demo.DRAFTER))
        own = ModelShape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
        )
        return adopt(build(str(demo.DRAFTER), shape=own, device=scale.device, dtype=scale.dtype))

    models: dict[str, Callable[[], LoadedModel]] = {
        "shipped drafter": shipped,
        "small": lambda: scale.model("small"),
    }
    for name, load in models.items():
        steps: dict[str, dict[int, float]] = {}
        for path in (ModelPath.CAPTURED, ModelPath.FLAT):
            bench = StepBenchmark(load(), settings=scale.engine(path=path))
            steps[path.value] = {
                sessions: bench.time(
                    sessions=sessions,
                    context_tokens=scale.context_tokens,
                    passes=scale.passes,
                ).step_ms
                for sessions in scale.sessions
            }
            del bench
            free(scale)
        for sessions in scale.sessions:
            captured_ms, flat_ms = (steps[path][sessions] for path in ("captured", "flat"))
            yield {
                "model": name,
                "sessions": sessions,
                "captured_ms": captured_ms,
                "flat_ms": flat_ms,
                "speedup": flat_ms / captured_ms,
            }


def blocks(scale: Scale, _: float) -> Iterator[Finding]:
    """Yield the time of a drafted block, by token and with one read."""
    from tests.gpu import blocks as drafted  # noqa: PLC0415 - needs more wheels

    yield from drafted.measure(scale)


def steps(scale: Scale, _: float, size: str) -> Iterator[Finding]:
    """Yield the times of decoding and of verifying, over what reading weights and keys takes."""
    from cascade.benchmark.microbench import StepBenchmark  # noqa: PLC0415 - needs more wheels

    bytes_per_s, model = read_bandwidth(scale), scale.model(size)
    weight_bytes = sum(one.numel() * one.element_size() for one in model.model.parameters())
    config: Any = model.model.config
    heads = config.num_key_value_heads * config.head_dim
    token_bytes = 2 * config.num_hidden_layers * heads * scale.dtype.itemsize
    yield {"model": size, "gib": weight_bytes / GIB, "read_gb_per_s": bytes_per_s / 1e9}
    bench = StepBenchmark(model, settings=scale.engine())
    for sessions in scale.sessions:
        read_bytes = weight_bytes + sessions * scale.context_tokens * token_bytes
        floor_ms = 1e3 * read_bytes / bytes_per_s
        for block_tokens in (0, 5):
            found = bench.time(
                sessions=sessions,
                block_tokens=block_tokens,
                context_tokens=scale.context_tokens,
                passes=scale.passes,
            )
            yield {
                "model": size,
                "sessions": sessions,
                "block_tokens": block_tokens,
                "step_ms": found.step_ms,
                "floor_ms": floor_ms,
                "times_floor": found.step_ms / floor_ms,
                "verification_share": found.handler_share,
            }


def pair(scale: Scale, _: float, size: str) -> Iterator[Finding]:
    """Yield tokens per second of drafter and expert as two processes on the device."""
    from tests.gpu import pair as speed  # noqa: PLC0415 - needs more wheels

    for finding in asyncio.run(speed.measure(scale, size)):
        yield {"model": size, **finding}


def read_bandwidth(scale: Scale) -> float:
    """Return the bytes per second at which the device reads its memory, the best of some trials."""
    values = torch.ones(scale.bandwidth_bytes // 4, device=scale.device)
    best_s = float("inf")
    for _ in range(6):
        synchronize(scale)
        began_s = time.perf_counter()
        values.sum()
        synchronize(scale)
        best_s = min(best_s, time.perf_counter() - began_s)
    del values
    free(scale)
    return scale.bandwidth_bytes / best_s


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    if scale.device.startswith("cuda"):
        torch.cuda.synchronize(scale.device)


def free(scale: Scale) -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if scale.device.startswith("cuda"):
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[..., Iterator[Finding]]] = {
    "device": device,
    "paths": paths,
    "graphs": graphs,
    "blocks": blocks,
    "steps": steps,
    "pair": pair,
}


def main() -> None:
    """Run one section and write its findings, a line each, as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--device", required=True)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    section = SECTIONS[options.section]
    with options.out.open("w", buffering=1) as out:
        for finding in section(scale_of(options.device), options.limit_s, *options.arguments):
            out.write(json.dumps(finding) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
