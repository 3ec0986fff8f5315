"""What a person may choose about one engine; every default is safe on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Path(StrEnum):
    """How ragged sessions meet the model; `AUTO` is the first that the self-check proves exact."""

    AUTO = "auto"
    LEAN = "lean"  # our own forward pass, for Llama-like models on a CPU
    CAPTURED = "captured"  # flat, and steps of one token a session replayed as CUDA graphs
    FLAT = "flat"  # all tokens in one row, our attention over the cache in place
    PADDED = "padded"  # left-padded rows, the model's own attention over a gathered cache


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One model on one device. Zeros mean "choose for me"."""

    device: str = "auto"  # a torch device; auto is cuda where there is one
    dtype: str = "auto"  # auto is float32 on a CPU, the checkpoint's own elsewhere
    threads: int = 0  # of torch in this process
    cache_tokens: int = 0  # capacity of the KV cache, in tokens of all sessions together
    cache_bytes: int = 0  # the same as memory; read where cache_tokens is 0
    max_step_tokens: int = 0  # tokens of one forward pass; 512 on a CPU, 4096 elsewhere
    max_sessions: int = 256  # open at once; one more is refused
    prefix_reuse: bool = True  # keep released sessions for prompts that begin like them
    deterministic: bool = False  # a token's row is the same to the bit in any batch; CPU alone
    packed: bool = True  # pre-packed linear layers, where the CPU has kernels for them
    path: Path = Path.AUTO
    vocabulary: int = 0  # columns of logits kept: the pair's common vocabulary


def step_tokens(settings: EngineSettings, *, device: str) -> int:
    """Return the token budget of one forward pass on `device` ("cpu", "cuda", ...)."""
    return settings.max_step_tokens or (512 if device == "cpu" else 4096)
