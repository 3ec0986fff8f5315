"""Choose the fastest path that is exact for a model, by a check at load.

Models differ in more ways than a list can cover, and a wrong cache gives fluent nonsense. So each
path has to pass the self-check before it is taken.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cascade.engine import encoder_decoder, threads
from cascade.engine.backends import prepacked_linear
from cascade.engine.backends.base import PathUnsupported, Runner
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
from cascade.engine.backends.mask_probe import original_attention
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.self_check import SelfCheck
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.kv_pool import capacity_tokens, free_bytes
from cascade.engine.model_loader import check_state
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from cascade.engine.model_loader import LoadedModel

log = logging.getLogger(__name__)

_RECURRENT = re.compile(r"conv|linear|mamba|recurrent|lightning|ssm")


def prepare(model: LoadedModel, *, settings: EngineSettings) -> tuple[Runner[Any], int]:
    """Return a runner with its pool, and how many tokens that holds.

    All ranks of a sharded model call it.

    Raises:
        UnsupportedModel: No path is exact; the message says why.
    """
    device, ranks = model.model.device, model.ranks
    if ranks is None:
        runner = select_runner(model.model, settings=settings, owned=model.owned)
    else:
        if not (settings.cache_tokens or settings.cache_bytes):
            free = ranks.exchange(
                str(free_bytes(device, utilization=settings.gpu_memory_utilization))
            )
            settings = replace(settings, cache_bytes=min(map(int, free)))
        runner = select_runner(model.model, settings=settings, agree=ranks.agree)
    if isinstance(runner, EncoderDecoderRunner):
        capacity, sources = encoder_decoder.capacities(model.model.config, settings, runner)
        log.info("Warming up, with a cache of %d tokens and %d of sources", capacity, sources)
        runner.resize(num_slots=capacity, source_slots=sources)
    else:
        capacity = capacity_tokens(
            settings,
            device=device,
            bytes_per_token=runner.pool.bytes_per_token,
            context_length=model.context_length,
        )
        log.info("Warming up, with a cache of %d tokens", capacity)
        runner.resize(num_slots=capacity)
    runner.warm_up()
    threads.trim_memory()
    return runner, capacity


def select_runner(
    model: PreTrainedModel,
    *,
    settings: EngineSettings,
    owned: bool = False,
    agree: Callable[[str], str] = str,
) -> Runner[Any]:
    """Return a runner of the first path that is exact for `model`.

    Args:
        model: The model.
        settings: Of the engine.
        owned: The runner may take the model's weights.
        agree: Returns why a step failed on any rank of a sharded model, given why on this one.

    Raises:
        UnsupportedModel: No path is; the message says why.
    """
    check_state(type(model))
    original = original_attention(model)
    model.set_attn_implementation(original)
    try:
        check = SelfCheck(model, settings=settings)
    except UnsupportedModel as error:
        agree(error.message)
        raise
    reasons: dict[Path, str] = {}
    for path, build in paths(model, settings, owned=owned):
        model.set_attn_implementation(original)
        log.info("Checking the %s path against the plain forward pass", path)
        runner, reason = None, ""
        try:
            convert = partial(build, consume=True) if owned and path is Path.LEAN else None
            runner = check.passed(build, convert=convert)
        except PathUnsupported as error:
            reason = str(error)
        reason = agree(reason)
        if runner is not None and not reason:
            return runner
        reasons[path] = reason
        log.info("%s is not served by the %s path: %s", type(model).__name__, path, reason)
    model.set_attn_implementation(original)
    kinds = _recurrent_layers(model)
    if kinds:
        raise UnsupportedModel(
            f"{type(model).__name__} has layers of kind {', '.join(kinds)}, whose recurrent state "
            "cannot be rolled back when drafted tokens are rejected; serve a model whose layers "
            "all use attention"
        )
    why = "; ".join(f"{path} path: {reason}" for path, reason in reasons.items())
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be served exactly ({why}); serve a model in which a token "
        "sees those before it alone, and whose cache is keys and values"
    )


def _recurrent_layers(model: PreTrainedModel) -> list[str]:
    """Return the kinds of a model's layers that say they keep a recurrent state."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds: list[str] = getattr(config, "layer_types", None) or []
    return sorted({kind for kind in kinds if _RECURRENT.search(kind)})


def paths(
    model: PreTrainedModel, settings: EngineSettings, *, owned: bool = False
) -> Iterator[tuple[Path, Callable[..., Runner[Any]]]]:
    """Yield the paths that settings and device allow and how to build each, fastest first.

    Args:
        model: The model.
        settings: Of the engine.
        owned: The paths may take the model's weights.
    """
    exact, packed = settings.deterministic, settings.packed or settings.deterministic
    auto = settings.path is Path.AUTO
    if model.config.is_encoder_decoder:
        encoder_decoder.check_settings(settings)
        if packed:
            prepacked_linear.pack(model, deterministic=False, consume=owned)
        yield Path.PADDED, lambda: EncoderDecoderRunner(model)
        yield Path.PADDED, lambda: EncoderDecoderRunner(model, alone=True)
        return
    if settings.tensor_parallel > 1:
        # Our own forward pass, packed layers and graphs are for the weights of one device.
        yield from _model_paths(model, settings)
        return
    if auto or settings.path is Path.LEAN:
        yield Path.LEAN, partial(CpuLlamaRunner, model, packed=packed, deterministic=exact)
    if settings.path is Path.LEAN:
        return
    if exact and model.device.type != "cpu":
        prepacked_linear.fix_batches(model)
    elif packed:
        prepacked_linear.pack(model, deterministic=exact, consume=owned)
    if settings.path is Path.CAPTURED or (auto and model.device.type == "cuda"):
        yield Path.CAPTURED, lambda: CudaGraphRunner(model, deterministic=exact)
    yield from _model_paths(model, settings)


def _model_paths(
    model: PreTrainedModel, settings: EngineSettings
) -> Iterator[tuple[Path, Callable[..., Runner[Any]]]]:
    """Yield the paths that run the model's own forward pass, pass by pass."""
    exact, auto = settings.deterministic, settings.path is Path.AUTO
    if auto or settings.path is Path.FLAT:
        yield Path.FLAT, lambda: VarlenRunner(model, deterministic=exact)
    if (auto or settings.path is Path.PADDED) and not exact:
        yield Path.PADDED, lambda: PaddedRunner(model)
        yield Path.PADDED, lambda: PaddedRunner(model, alone=True)
