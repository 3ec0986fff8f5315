"""GPTQ and AWQ checkpoints, where gptqmodel is installed: it wants a newer torch than we pin."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.conftest import random_model
from tests.integration.test_quantised import VOCABULARY, check
from tests.support.quantised import read

if TYPE_CHECKING:
    from pathlib import Path

# Two for loading models, which it does not have by default on two cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
gptqmodel: Any = pytest.importorskip("gptqmodel")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # its own, and those of the torch that it was not made for
]


def quantised(source: Path, folder: Path, config: Any) -> Path:
    """Write a checkpoint, calibrated on random text."""
    model = gptqmodel.GPTQModel.load(str(source), config)
    texts = [torch.randint(0, VOCABULARY, (1, 256)) for _ in range(16)]
    model.quantize(
        [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts],
        batch_size=1,
    )
    model.save(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["gptq", "awq"])
async def test_a_checkpoint_of_gptqmodel_writes_its_own_text(tmp_path: Path, kind: str) -> None:
    plain = random_model(tmp_path / "plain", vocabulary=VOCABULARY, width=256, layers=2, seed=4)
    file = plain.path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "B", "eos_token": "C"}))
    make = gptqmodel.quantization.config.AWQConfig if kind == "awq" else gptqmodel.QuantizeConfig
    settings = make(bits=4, group_size=32, device="cpu")
    folder = quantised(plain.path, tmp_path / kind, settings)

    await check(
        drafter=plain.path,
        expert=folder,
        own=read(folder, dtype=torch.float32),
        other=plain.model,
        count=50,
    )
