"""Choose the fastest path that is exact for a model, by a check at load.

Models differ in more ways than a list can cover, and a wrong cache gives fluent nonsense. So each
path has to pass the self-check before it is taken.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cascade.engine.backends import prepacked_linear
from cascade.engine.backends.base import PathUnsupported, Runner
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.backends.mask_probe import original_attention
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.self_check import SelfCheck
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.model_loader import check_state
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def select_runner(model: PreTrainedModel, *, settings: EngineSettings) -> Runner[Any]:
    """Return a runner of the first path that is exact for `model`.

    Raises:
        UnsupportedModel: No path is; the message says why.
    """
    check_state(type(model))
    original = original_attention(model)
    model.set_attn_implementation(original)
    check = SelfCheck(model, settings=settings)
    reasons: dict[Path, PathUnsupported] = {}
    for path, build in paths(model, settings):
        model.set_attn_implementation(original)
        try:
            return check.passed(build)
        except PathUnsupported as reason:
            reasons[path] = reason
            log.info("%s is not served by the %s path: %s", type(model).__name__, path, reason)
    model.set_attn_implementation(original)
    why = "; ".join(f"{path} path: {reason}" for path, reason in reasons.items())
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be served exactly ({why}); serve a "
        "decoder-only model whose cache is keys and values"
    )


def paths(
    model: PreTrainedModel, settings: EngineSettings
) -> Iterator[tuple[Path, Callable[[], Runner[Any]]]]:
    """Yield the paths that settings and device allow and how to build each, fastest first."""
    exact, packed = settings.deterministic, settings.packed or settings.deterministic
    auto = settings.path is Path.AUTO
    if auto or settings.path is Path.LEAN:
        yield Path.LEAN, lambda: CpuLlamaRunner(model, packed=packed, deterministic=exact)
    if settings.path is Path.LEAN:
        return
    if exact and model.device.type != "cpu":
        prepacked_linear.fix_batches(model)
    elif packed:
        prepacked_linear.pack(model, deterministic=exact)
    if settings.path is Path.CAPTURED or (auto and model.device.type == "cuda"):
        yield Path.CAPTURED, lambda: CudaGraphRunner(model, deterministic=exact)
    if auto or settings.path is Path.FLAT:
        yield Path.FLAT, lambda: VarlenRunner(model, deterministic=exact)
    if (auto or settings.path is Path.PADDED) and not exact:
        yield Path.PADDED, lambda: PaddedRunner(model)
        yield Path.PADDED, lambda: PaddedRunner(model, alone=True)
