"""The check at load sees what a path does wrong, at every length that sessions may have."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.engine.architectures import build
from torch import nn
from transformers import Gemma3Config

from cascade.engine.backends import base, mask_probe, select, self_check
from cascade.engine.backends.base import RopeLengths, boundaries
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAT = EngineSettings(cache_tokens=1024, path=Path.FLAT)


@pytest.fixture
def no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every layer for one with full attention."""
    found = mask_probe.windows

    def blind(model: PreTrainedModel) -> dict[int, int | None]:
        return dict.fromkeys(found(model))

    monkeypatch.setattr(mask_probe, "windows", blind)


@pytest.mark.usefixtures("no_windows")
@pytest.mark.parametrize("window", [30, 250])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, Path.FLAT) for name in ("mistral sliding", "gemma2", "gemma3", "gpt-oss")),
        *((name, Path.LEAN) for name in ("mistral sliding", "qwen2 sliding")),
    ],
)
def test_a_path_that_ignores_a_window_is_refused(name: str, path: Path, window: int) -> None:
    model = build(name, sliding_window=window)

    with pytest.raises(UnsupportedModel, match=f"beyond {window} tokens differ from the plain"):
        select.select_runner(model, settings=EngineSettings(cache_tokens=1024, path=path))


@pytest.mark.usefixtures("no_windows")
def test_a_window_is_missed_in_half_precision_too() -> None:
    model = build("gemma2", sliding_window=250)
    nn.Module.to(model, torch.bfloat16)

    with pytest.raises(UnsupportedModel, match="beyond 250 tokens differ from the plain"):
        select.select_runner(model, settings=FLAT)


@pytest.mark.usefixtures("no_windows")
@pytest.mark.parametrize("settings", [{"max_position_embeddings": 200}, {"sliding_window": 2000}])
def test_lengths_that_no_session_reaches_are_not_crossed(settings: dict[str, int]) -> None:
    more = {"sliding_window": 250, "max_position_embeddings": 4096} | settings
    model = build("gemma2", **more)

    assert isinstance(select.select_runner(model, settings=FLAT), VarlenRunner)


@pytest.mark.parametrize("name", ["longrope", "dynamic", "two original lengths"])
@pytest.mark.parametrize("path", [Path.FLAT, Path.PADDED])
def test_a_path_with_one_rope_for_a_whole_pass_is_refused(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(_: PreTrainedModel) -> RopeLengths:
        return RopeLengths()

    for module in (base, self_check):
        monkeypatch.setattr(module, "find_rope_lengths", blind)

    with pytest.raises(UnsupportedModel, match=r"around positions (40, )?64 differ from the plain"):
        select.select_runner(build(name), settings=EngineSettings(cache_tokens=1024, path=path))


def test_long_sessions_run_through_the_first_layers_only() -> None:
    model: Any = build("gemma2", sliding_window=250)
    layers, longest = model.model.layers, defaultdict[int, int](int)

    def record(index: int, _: nn.Module, hidden: Any) -> None:
        longest[index] = max(longest[index], hidden[0].shape[1])

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(record, index))
    select.select_runner(model, settings=FLAT)

    assert model.model.layers is layers
    assert min(longest[0], longest[1]) > 250
    assert max(longest[2], longest[3]) < 50


@pytest.mark.parametrize(
    ("settings", "attention", "position"),
    [
        ({"sliding_window": 4096, "layer_types": None}, {4096}, {131_072}),
        (
            {
                "sliding_window": 512,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {
                        "rope_type": "yarn",
                        "factor": 4.0,
                        "original_max_position_embeddings": 9000,
                    },
                },
            },
            {512},
            {9000, 131_072},
        ),
        ({"attention_chunk_size": 8192, "window_sizes": [100, 0]}, {100, 4096, 8192}, {131_072}),
        ({"use_sliding_window": True, "index_topk": 2048}, {2048, 4096}, {131_072}),
    ],
)
def test_boundaries_are_read_from_any_part_of_a_configuration(
    settings: dict[str, Any], attention: set[int], position: set[int]
) -> None:
    config = Gemma3Config(text_config={"max_position_embeddings": 131_072, **settings})

    named = boundaries(config, below=10**6)

    assert attention <= set(named.attention) <= attention | {6}  # layers in a period
    assert set(named.position) == position
    assert boundaries(config, below=2).attention == ()
