from __future__ import annotations

import pytest
import torch

from cascade.engine import selfcheck
from cascade.engine.batch import FlatBatch
from cascade.engine.runner import FlatRunner, PaddedRunner
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

from .architectures import build

AUTO = EngineSettings()


@pytest.mark.parametrize(
    ("name", "path"), [("llama", FlatRunner), ("gpt-oss", FlatRunner), ("llama4", PaddedRunner)]
)
def test_the_first_exact_path_is_taken(name: str, path: type) -> None:
    assert isinstance(selfcheck.choose(build(name), settings=AUTO), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_half_precision_is_no_reason_to_refuse(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    torch.nn.Module.to(model, dtype)

    assert isinstance(selfcheck.choose(model, settings=AUTO), FlatRunner)


def test_a_path_that_is_asked_for_is_not_replaced() -> None:
    only_padded = EngineSettings(path=Path.PADDED)
    assert isinstance(selfcheck.choose(build("llama"), settings=only_padded), PaddedRunner)

    with pytest.raises(UnsupportedModel, match="flat path: its layers do not use"):
        selfcheck.choose(build("bloom"), settings=EngineSettings(path=Path.FLAT))


def test_a_model_can_be_checked_again_after_an_engine_had_it() -> None:
    model = build("llama")

    assert isinstance(selfcheck.choose(model, settings=AUTO), FlatRunner)
    assert isinstance(selfcheck.choose(model, settings=AUTO), FlatRunner)


def unmasked(*_: object) -> None:
    """Return no mask, as where every query sees every key."""


def test_a_wrong_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that forgets to mask the refused tokens would speak fluently, and wrongly."""
    monkeypatch.setattr(FlatBatch, "mask", unmasked)

    with pytest.raises(UnsupportedModel, match="flat path: its logits differ"):
        selfcheck.choose(build("llama"), settings=EngineSettings(path=Path.FLAT))


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    model = build("llama")
    model.forward = model.model.rotary_emb.forward

    with pytest.raises(UnsupportedModel, match="cannot run on token ids alone"):
        selfcheck.choose(model, settings=AUTO)
