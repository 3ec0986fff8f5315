from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine import architectures, encoder_decoders

from cascade.engine.backends.base import PathUnsupported
from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.memory_plan import MemoryPlan, plan_memory
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
NAMES = ("llama", "qwen3", "gpt2", "mixtral", "deepseek-v3", "falcon", "cohere2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_what_an_engine_then_takes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = architectures.build(name)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(tmp_path)
    plan = plan_memory(str(tmp_path), dtype=dtype)
    held = {one.data_ptr(): one for one in model.parameters()}.values()
    assert plan.weights_bytes == sum(one.nbytes for one in held)
    try:
        runner = VarlenRunner(model)
        runner.resize(num_slots=128)
        runner.warm_up()
    except PathUnsupported:
        runner = PaddedRunner(model)
        runner.resize(num_slots=128)
        runner.warm_up()
    assert plan.token_bytes == runner.pool.bytes_per_token
    assert plan.context_tokens == 512


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_token_of_an_encoder_decoder_takes_as_much_in_the_prompt_as_in_the_answer(
    name: str, tmp_path: Path
) -> None:
    model = encoder_decoders.build(name)
    model.save_pretrained(tmp_path)
    plan = plan_memory(str(tmp_path))
    runner = EncoderDecoderRunner(model)
    runner.resize(num_slots=128, source_slots=128)
    runner.warm_up()

    assert plan.token_bytes == runner.pool.bytes_per_token == runner.source_pool.bytes_per_token


def test_the_type_of_the_checkpoint_is_the_default(tmp_path: Path) -> None:
    model = architectures.build("llama")
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert plan_memory(str(tmp_path)) == plan_memory(str(tmp_path), dtype=torch.bfloat16)


def test_a_model_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        plan_memory(str(tmp_path))


def test_sessions_share_what_the_weights_leave_of_a_gpus_share() -> None:
    plan = MemoryPlan(
        parameters=8 * 10**9, weights_bytes=16 * GIB, token_bytes=2**17, context_tokens=131072
    )
    tokens = plan.cache_tokens(80 * GIB, utilization=0.9)
    assert tokens == (72 - 16) * 2**13
    assert plan.sessions(80 * GIB, utilization=0.9, session_tokens=4096) == tokens // 4096
    assert plan.sessions(80 * GIB, utilization=0.9, session_tokens=4000) == tokens // 4096
    assert plan.cache_tokens(80 * GIB, utilization=0.1) == 0
