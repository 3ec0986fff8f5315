"""llama.cpp computes from our GGUF files what transformers computes from the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support.shipped_pair import SETTINGS
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cascade.benchmark import gguf_model
from cascade.benchmark.baseline_requests import Prompts
from cascade.benchmark.llama_server import Servers, command_of
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}


def llama(*, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Return a random model whose next token depends on where the tokens before it are."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }  # fmt: skip
    config = LlamaConfig(**(sizes | fields))
    return LlamaForCausalLM(config).to(dtype).eval()  # pyright: ignore[reportArgumentType] - its stub


async def top_logprobs(folder: Path, prompt: list[int]) -> dict[int, float]:
    """Return the likeliest next tokens of llama.cpp, by id."""
    pair = SETTINGS.pair()
    servers = Servers(
        command=command_of(""),
        folder=folder,
        prompts=Prompts(tokenizer=pair.tokenizer, stop_ids=pair.stop_ids),
        slots=1,
        context_tokens=512,
        settings=SETTINGS,
        gpu=False,
    )
    async with servers.start() as client:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0}
        answer = (await client.http.post("/completion", json=asked)).json()
    (place,) = answer["completion_probabilities"]
    return {one["id"]: one["logprob"] for one in place["top_logprobs"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 32},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": LINEAR_ROPE},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=str,
)
async def test_logprobs_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The prompt is long enough for rotary frequencies and heads in the wrong place to show."""
    model = llama(**fields)
    gguf_model.write(model, tmp_path / "expert.gguf", stop_ids=(1,))
    prompt = [(7 * number * number + 3) % 96 for number in range(200)]
    with torch.inference_mode():
        logits_V = model.float()(torch.tensor([prompt])).logits[0, -1]
    expected_V = logits_V.log_softmax(-1)
    found = await top_logprobs(tmp_path, prompt)
    assert len(found) == 10
    assert max(found, key=found.__getitem__) == int(expected_V.argmax())
    for token, logprob in found.items():
        assert logprob == pytest.approx(float(expected_V[token]), abs=0.1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: MistralForCausalLM(
                MistralConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, head_dim=4)
            ),
            "is a mistral",
        ),
        (lambda: llama(attention_bias=True), "has biases"),
        (lambda: llama(rope_parameters=YARN_ROPE), "rotary embedding yarn"),
    ],
    ids=["mistral", "biases", "yarn"],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, model: Any, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        gguf_model.write(model(), tmp_path / "expert.gguf", stop_ids=(1,))


def test_more_stop_tokens_than_a_file_can_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="any of 4 tokens"):
        gguf_model.write(llama(), tmp_path / "expert.gguf", stop_ids=(1, 2, 3, 4))
