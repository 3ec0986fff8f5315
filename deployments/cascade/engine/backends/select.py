"""The proof at load that a path computes what the model's plain forward pass does.

Models differ in ways no list can keep up with, and a wrong cache gives fluent nonsense. So each
path runs a small ragged scenario with rollback and is taken only if every row agrees.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cascade.engine.backends import prepacked_linear
from cascade.engine.backends.base import PaddedRunner, Runner
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.engine.backends.mask_probe import Unsuited, own_attention
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Segment
from cascade.engine.kv_allocator import SMALLEST
from cascade.engine.model_loader import check_state
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# The largest error of a row, as a share of its largest logit, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.1}

# In half precision a near tie between experts of a mixture may fall the other way in a few rows.
_HALF_QUANTILE = 0.75

_FEW_IDS = 50  # fewer than any vocabulary has


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """`tokens` after `past` of a sequence; `context` is all of it."""

    session: int
    past: int
    context: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.context[self.past :]


def choose(model: PreTrainedModel, *, settings: EngineSettings) -> Runner:
    """Return the first path that is exact for `model`.

    Raises:
        UnsupportedModel: if none is; the message says why.
    """
    check_state(type(model))
    if settings.deterministic and model.device.type != "cpu":
        raise UnsupportedModel(
            f"deterministic rows were asked for on {model.device}; only the CPU path has them"
        )
    usual = own_attention(model)
    model.set_attn_implementation(usual)
    scenario = _scenario(model)
    expected = _plainly(model, scenario)
    reasons: list[str] = []
    for path, build in paths(model, settings):
        model.set_attn_implementation(usual)
        try:
            return _proved(build, scenario, expected, exact=settings.deterministic)
        except Unsuited as reason:
            reasons.append(f"{path} path: {reason}")
            log.info("%s is not served by the %s path: %s", type(model).__name__, path, reason)
    model.set_attn_implementation(usual)
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be served exactly ({'; '.join(reasons)}); serve a "
        "decoder-only model whose cache is keys and values"
    )


def paths(
    model: PreTrainedModel, settings: EngineSettings
) -> Iterator[tuple[Path, Callable[[], Runner]]]:
    """Yield the paths that `model` may take and how each is built, the quickest first."""
    exact, packed = settings.deterministic, settings.packed or settings.deterministic
    if settings.path in {Path.AUTO, Path.LEAN}:
        yield Path.LEAN, lambda: CpuLlamaRunner(model, packed=packed, deterministic=exact)
    if settings.path is Path.LEAN:
        return
    if packed:
        prepacked_linear.pack(model, deterministic=exact)
    launches = settings.path is Path.AUTO and model.device.type == "cuda"
    if launches or settings.path is Path.CAPTURED:
        yield Path.CAPTURED, lambda: CudaGraphRunner(model, deterministic=exact)
    if settings.path is Path.CAPTURED:
        return
    if settings.path is not Path.PADDED:
        yield Path.FLAT, lambda: VarlenRunner(model, deterministic=exact)
    if settings.path is not Path.FLAT and not exact:
        yield Path.PADDED, lambda: PaddedRunner(model)


def _proved(
    build: Callable[[], Runner],
    scenario: list[list[_Block]],
    expected: list[list[Tensor]],
    *,
    exact: bool,
) -> Runner:
    try:
        runner = build()
        runner.resize(rows=2 * SMALLEST)
        actual = [_run(runner, blocks) for blocks in scenario]
    except Unsuited:
        raise
    # Model code we have never seen may fail in any way; each of them means: not this path.
    except Exception as error:
        raise Unsuited(f"it fails with {type(error).__name__}: {str(error)[:200]}") from error
    _compare(actual, expected)
    if exact:
        _prove_bits(runner)
    return runner


def _scenario(model: PreTrainedModel) -> list[list[_Block]]:
    """Return passes over two sessions: mixed, after a rollback of three tokens, of one token."""
    size = min(int(model.config.get_text_config(decoder=True).vocab_size), 1000)
    first = tuple((7 * i + 3) % size for i in range(26))
    wrong = (*first[:21], *((11 * i + 5) % size for i in range(3)))
    second = tuple((13 * i + 2) % size for i in range(11))
    return [
        [_Block(session=0, past=0, context=first[:20])],
        [
            _Block(session=0, past=20, context=wrong),
            _Block(session=1, past=0, context=second[:8]),
        ],
        [
            _Block(session=0, past=21, context=first[:24]),
            _Block(session=1, past=8, context=second[:10]),
        ],
        [
            _Block(session=0, past=24, context=first[:25]),
            _Block(session=1, past=10, context=second[:11]),
        ],
        [_Block(session=0, past=25, context=first[:26])],
    ]


def _run(runner: Runner, blocks: list[_Block]) -> list[Tensor]:
    segments = [
        Segment(
            start=block.session * SMALLEST,
            past=block.past,
            tokens=block.tokens,
            rows=len(block.tokens),
        )
        for block in blocks
    ]
    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for places in runner.split(segments):
            logits_NV = runner.forward([segments[place] for place in places])
            counts = [segments[place].rows for place in places]
            rows.update(zip(places, logits_NV.split(counts), strict=True))
    return [rows[place] for place in range(len(segments))]


def _plainly(model: PreTrainedModel, scenario: list[list[_Block]]) -> list[list[Tensor]]:
    try:
        return _expected(model, scenario)
    # As in `_proved`: any failure means that tokens alone do not make this model speak.
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run on token ids alone ({type(error).__name__}: "
            f"{str(error)[:200]}); serve a decoder-only language model"
        ) from error


def _expected(model: PreTrainedModel, scenario: list[list[_Block]]) -> list[list[Tensor]]:
    """Return the plain forward pass of every block's context, its last rows."""
    plain: dict[tuple[int, ...], Tensor] = {}
    for block in (block for blocks in scenario for block in blocks):
        if block.context not in plain:
            tokens = torch.tensor([block.context], device=model.device)
            with torch.inference_mode():
                plain[block.context] = model(input_ids=tokens, use_cache=False).logits[0]
    return [[plain[block.context][block.past :] for block in blocks] for blocks in scenario]


def _compare(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    got_NV = torch.cat([rows for blocks in actual for rows in blocks]).float()
    want_NV = torch.cat([rows for blocks in expected for rows in blocks])
    tolerance = _TOLERANCE.get(want_NV.dtype, 0.1)
    exact = want_NV.dtype in {torch.float32, torch.float64}
    want_NV = want_NV.float()
    error_N = (got_NV - want_NV).abs().amax(-1) / want_NV.abs().amax(-1).clamp(min=1e-6)
    error = float(error_N.max() if exact else error_N.quantile(_HALF_QUANTILE))
    if not error <= tolerance:
        raise Unsuited(
            f"its logits differ from the plain forward pass by {error:.1e} of the largest logit "
            f"(allowed {tolerance:.0e})"
        )


def _prove_bits(runner: Runner) -> None:
    """Raise Unsuited unless tokens give the same bits one by one and in blocks beside others."""
    first = tuple((7 * i + 3) % _FEW_IDS for i in range(26))
    other = tuple((13 * i + 2) % _FEW_IDS for i in range(37))
    with torch.inference_mode():
        runner.forward([Segment(start=0, past=0, tokens=first[:20])])
        alone_NV = torch.cat(
            [
                runner.forward([Segment(start=0, past=i, tokens=first[i : i + 1], rows=1)])
                for i in range(20, 26)
            ]
        )
        for beside in (other[:3], other):
            company = Segment(start=SMALLEST, past=0, tokens=beside, rows=1)
            runner.forward([Segment(start=0, past=0, tokens=first[:20]), company])
            block = Segment(start=0, past=20, tokens=first[20:], rows=6)
            if not torch.equal(runner.forward([block, company])[:6], alone_NV):
                raise Unsuited("on this CPU its rows depend on the batch to the bit")
