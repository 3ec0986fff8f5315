"""Choose the fastest path that is exact for a model, by a check at load.

Models differ in more ways than a list can cover, and a wrong cache gives fluent nonsense. So each
path runs a small ragged scenario with rollback, and is taken only if all its logits agree with the
model's plain forward pass.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cascade.engine.backends import prepacked_linear
from cascade.engine.backends.base import PathUnsupported, Runner
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.backends.mask_probe import original_attention
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Segment
from cascade.engine.kv_pool import MIN_RANGE
from cascade.engine.model_loader import check_state
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Largest error of a token's logits, as a share of the largest logit, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.1}

# In half precision a near tie in the routing of a mixture of experts may change for a few tokens.
_HALF_QUANTILE = 0.75
_FEW_IDS = 50  # fewer than any vocabulary has


class _Block(NamedTuple):
    """The tokens of `context` after the first `past`, to run in one pass."""

    session: int
    past: int
    context: tuple[int, ...]

    @property
    def segment(self) -> Segment:
        tokens = self.context[self.past :]
        start = self.session * MIN_RANGE
        return Segment(start=start, past=self.past, tokens=tokens, num_logits=len(tokens))


def select_runner(model: PreTrainedModel, *, settings: EngineSettings) -> Runner[Any]:
    """Return a runner of the first path that is exact for `model`.

    Raises:
        UnsupportedModel: No path is; the message says why.
    """
    check_state(type(model))
    if settings.deterministic and model.device.type != "cpu":
        raise UnsupportedModel(f"deterministic is set on {model.device}; only a CPU supports it")
    original = original_attention(model)
    model.set_attn_implementation(original)
    scenario = _scenario(model)
    expected = _plain_logits(model, scenario)
    reasons: list[str] = []
    for path, build in paths(model, settings):
        model.set_attn_implementation(original)
        try:
            return _checked(build, scenario, expected, deterministic=settings.deterministic)
        except PathUnsupported as reason:
            reasons.append(f"{path} path: {reason}")
            log.info("%s is not served by the %s path: %s", type(model).__name__, path, reason)
    model.set_attn_implementation(original)
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be served exactly ({'; '.join(reasons)}); serve a "
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
    if packed:
        prepacked_linear.pack(model, deterministic=exact)
    if settings.path is Path.CAPTURED or (auto and model.device.type == "cuda"):
        yield Path.CAPTURED, lambda: CudaGraphRunner(model, deterministic=exact)
    if auto or settings.path is Path.FLAT:
        yield Path.FLAT, lambda: VarlenRunner(model, deterministic=exact)
    if (auto or settings.path is Path.PADDED) and not exact:
        yield Path.PADDED, lambda: PaddedRunner(model)


def _checked(
    build: Callable[[], Runner[Any]],
    scenario: list[list[_Block]],
    expected: Tensor,
    *,
    deterministic: bool,
) -> Runner[Any]:
    try:
        runner = build()
        runner.resize(num_slots=2 * MIN_RANGE)
        with torch.inference_mode():
            segments = [[block.segment for block in blocks] for blocks in scenario]
            actual = torch.cat([runner.forward(one_pass) for one_pass in segments])
    except PathUnsupported:
        raise
    # Unknown model code may fail in any way, and each means that this path cannot serve it.
    except Exception as error:
        raise PathUnsupported(
            f"it fails with {type(error).__name__}: {str(error)[:200]}"
        ) from error
    _compare(actual, expected)
    if deterministic:
        _check_batch_invariance(runner)
    return runner


def _scenario(model: PreTrainedModel) -> list[list[_Block]]:
    """Return passes over two sessions: mixed, after a rollback of three tokens, of one token."""
    size = min(int(model.config.get_text_config(decoder=True).vocab_size), 1000)
    first = tuple((7 * i + 3) % size for i in range(26))
    wrong = (*first[:21], *((11 * i + 5) % size for i in range(3)))
    second = tuple((13 * i + 2) % size for i in range(11))
    passes = [
        [(0, 0, first[:20])],
        [(0, 20, wrong), (1, 0, second[:8])],
        [(0, 21, first[:24]), (1, 8, second[:10])],
        [(0, 24, first[:25]), (1, 10, second[:11])],
        [(0, 25, first[:26])],
    ]
    return [[_Block(*block) for block in blocks] for blocks in passes]


def _plain_logits(model: PreTrainedModel, scenario: list[list[_Block]]) -> Tensor:
    """Return the logits of every block by the model's plain forward pass over its context."""
    plain: dict[tuple[int, ...], Tensor] = {}
    blocks = [block for blocks in scenario for block in blocks]
    try:
        for context in {block.context for block in blocks}:
            tokens = torch.tensor([context], device=model.device)
            with torch.inference_mode():
                plain[context] = model(input_ids=tokens, use_cache=False).logits[0]
    # As in `_checked`: any failure means that the model needs more than tokens.
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run on token ids alone ({type(error).__name__}: "
            f"{str(error)[:200]}); serve a decoder-only language model"
        ) from error
    return torch.cat([plain[block.context][block.past :] for block in blocks])


def _compare(actual_NV: Tensor, expected_NV: Tensor) -> None:
    tolerance = _TOLERANCE.get(expected_NV.dtype, 0.1)
    full_precision = expected_NV.dtype in {torch.float32, torch.float64}
    actual_NV, expected_NV = actual_NV.float(), expected_NV.float()
    largest_N = expected_NV.abs().amax(-1).clamp(min=1e-6)
    error_N = (actual_NV - expected_NV).abs().amax(-1) / largest_N
    error = float(error_N.max() if full_precision else error_N.quantile(_HALF_QUANTILE))
    if not error <= tolerance:
        raise PathUnsupported(
            f"its logits differ from the plain forward pass by {error:.1e} of the largest logit "
            f"(allowed {tolerance:.0e})"
        )


def _check_batch_invariance(runner: Runner[Any]) -> None:
    """Raise PathUnsupported unless logits are the same to the bit alone and beside others."""
    first = tuple((7 * i + 3) % _FEW_IDS for i in range(26))
    other = tuple((13 * i + 2) % _FEW_IDS for i in range(37))
    prompt = Segment(start=0, past=0, tokens=first[:20])
    block = Segment(start=0, past=20, tokens=first[20:], num_logits=6)
    with torch.inference_mode():
        runner.forward([prompt])
        singles = [
            Segment(start=0, past=i, tokens=first[i:][:1], num_logits=1) for i in range(20, 26)
        ]
        alone_NV = torch.cat([runner.forward([single]) for single in singles])
        for tokens in (other[:3], other):
            beside = Segment(start=MIN_RANGE, past=0, tokens=tokens, num_logits=1)
            runner.forward([prompt, beside])
            if not torch.equal(runner.forward([block, beside])[:6], alone_NV):
                raise PathUnsupported("on this CPU its logits depend on the batch")
