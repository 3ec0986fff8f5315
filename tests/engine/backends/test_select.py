from __future__ import annotations

import pytest
import torch
from tests.engine.architectures import build

from cascade.engine.backends import select
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import RaggedBatch
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

AUTO = EngineSettings()


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", CpuLlamaRunner), ("gpt-oss", VarlenRunner), ("llama4", PaddedRunner)],
)
def test_the_first_exact_path_is_taken(name: str, path: type) -> None:
    assert isinstance(select.select_runner(build(name), settings=AUTO), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_half_precision_passes_the_check(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    torch.nn.Module.to(model, dtype)

    assert isinstance(select.select_runner(model, settings=AUTO), VarlenRunner | CpuLlamaRunner)


def test_a_path_that_is_set_is_not_replaced() -> None:
    for path, kind in ((Path.PADDED, PaddedRunner), (Path.FLAT, VarlenRunner)):
        only = EngineSettings(path=path)
        assert isinstance(select.select_runner(build("llama"), settings=only), kind)

    with pytest.raises(UnsupportedModel, match="lean path: it is not a Llama-like model"):
        select.select_runner(build("gpt2"), settings=EngineSettings(path=Path.LEAN))
    with pytest.raises(UnsupportedModel, match="flat path: its layers do not use"):
        select.select_runner(build("bloom"), settings=EngineSettings(path=Path.FLAT))


def test_a_model_can_be_checked_again_after_an_engine_had_it() -> None:
    model = build("llama")

    assert isinstance(select.select_runner(model, settings=AUTO), CpuLlamaRunner)
    assert isinstance(select.select_runner(model, settings=AUTO), CpuLlamaRunner)


def unmasked(*_: object) -> None:
    """Return no mask, as if every query saw every key."""


def test_wrong_logits_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that does not mask rejected tokens would give fluent but wrong text."""
    monkeypatch.setattr(RaggedBatch, "mask", unmasked)

    for path in (Path.LEAN, Path.FLAT):
        with pytest.raises(UnsupportedModel, match=f"{path} path: its logits differ"):
            select.select_runner(build("llama"), settings=EngineSettings(path=path))


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    model = build("llama")
    model.forward = model.model.rotary_emb.forward

    with pytest.raises(UnsupportedModel, match="cannot run on token ids alone"):
        select.select_runner(model, settings=AUTO)
