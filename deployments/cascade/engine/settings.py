"""Settings of one engine. Every default is safe on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from cascade.types import Natural  # noqa: TC001 - pydantic reads annotations

MAX_RANKS = 64  # devices that share a model


class Path(StrEnum):
    """How the model runs; `AUTO` takes the fastest path that the check at load proves exact."""

    AUTO = "auto"
    LEAN = "lean"  # our own forward pass for Llama-like models on a CPU
    CAPTURED = "captured"  # flat, with decode steps of one token replayed as CUDA graphs
    FLAT = "flat"  # a variable-length batch without padding; our attention reads the cache in place
    PADDED = "padded"  # a left-padded batch and the model's own attention over a gathered cache


class VocabularyWay(StrEnum):
    """How a drafter's tokens are said in the expert's (`engine.vocabulary`)."""

    AUTO = "auto"  # the first of those below that does well enough
    SHARED = "shared"  # ids mean the same to both models, but for a few that are not drafted
    TLI = "tli"  # only tokens that both models have are drafted
    SLEM = "slem"  # text is drafted, and said in the expert's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertVocabulary:
    """Whose tokens a drafter drafts in."""

    model: str  # the expert: directory or repository id
    revision: str | None = None
    trust_remote_code: bool = False
    way: VocabularyWay = VocabularyWay.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One model on its devices; the `engine` branch of a tier. A zero lets the engine choose."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    device: str = "auto"  # a torch device; auto is cuda if there is one
    # auto is float32 on a CPU, else the checkpoint's
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # devices that share each layer's weights, with a process each
    tensor_parallel: Annotated[int, Interval(ge=1, le=MAX_RANKS)] = 1
    threads: Natural = 0  # torch threads of each process
    cache_tokens: Natural = 0  # capacity of the KV cache, for all sessions together
    cache_bytes: Natural = 0  # the same in bytes; read if cache_tokens is 0
    # share of a GPU's memory for weights and cache, of what num_gpus takes of the GPU
    gpu_memory_utilization: Annotated[float, Interval(gt=0, le=1)] = 0.9
    # of an encoder-decoder: most tokens that its encoder reads, and that an answer has; 0: as its
    # configuration says, else 1024
    source_tokens: Natural = 0
    answer_tokens: Natural = 0
    source_cache_tokens: Natural = 0  # capacity for encoded sources; 0: half of the cache's memory
    max_step_tokens: Natural = 0  # token budget of a forward pass; 512 on a CPU, else 4096
    max_sessions: Natural = 0  # open at once; 0: twice max_ongoing_requests, or 256 without Ray
    prefix_reuse: bool = True  # keep the cache of released sessions for prompts with that prefix
    deterministic: bool = False  # logits of a token do not depend on the batch
    packed: bool = True  # prepacked linear layers, where the CPU has kernels for them
    path: Path = Path.AUTO

    def __post_init__(self) -> None:
        """Refuse paths that cannot do what is asked."""
        if self.deterministic and self.path is Path.PADDED:
            raise ValueError(
                "path is padded, whose logits depend on the batch; with deterministic leave it "
                "auto, or set lean or flat"
            )
        if self.tensor_parallel > 1 and self.path in {Path.LEAN, Path.CAPTURED}:
            raise ValueError(
                f"path is {self.path.value}, which runs on one device; with tensor_parallel "
                f"{self.tensor_parallel} leave it auto, or set flat or padded"
            )

    @property
    def session_limit(self) -> int:
        """Return how many sessions may be open at once."""
        return self.max_sessions or 256


def step_tokens(settings: EngineSettings, *, device: str) -> int:
    """Return the token budget of a forward pass on `device` ("cpu", "cuda", ...)."""
    return settings.max_step_tokens or (512 if device == "cpu" else 4096)
