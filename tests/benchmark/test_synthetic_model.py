"""A cost-padded model says what its source says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from cascade.benchmark.synthetic_model import (
    LABEL,
    Shape,
    is_padded,
    pad,
    parse_parameters,
    shape_for,
)
from cascade.demo import EXPERT
from cascade.engine.model_loader import load
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

PROMPTS = ("Who is Buzz Aldrin?", "Clara has 3 books and finds 7 more. How many books has Clara?")


def own_shape(config: Any, **changes: int) -> Shape:
    """Return the sizes of a model, some of them changed."""
    own: dict[str, int] = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
    }
    return Shape(**(own | changes))


def larger(config: Any) -> Shape:
    """Return a shape that is larger in every way, by factors that are no powers of two."""
    return Shape(
        hidden=6 * (config.num_key_value_heads + 2) * 16,
        intermediate=config.intermediate_size + 100,
        layers=config.num_hidden_layers + 3,
        heads=3 * (config.num_key_value_heads + 2),
        groups=config.num_key_value_heads + 2,
    )


def written(folder: Path) -> PreTrainedModel:
    """Return the model of a folder in float32."""
    return load(str(folder), device="cpu", dtype="float32").model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 1000, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped expert, a little larger in every way."""
    out = tmp_path_factory.mktemp("padded")
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    pad(str(EXPERT), out=out, shape=larger(config), dtype=torch.float32)
    return out


def test_its_logits_are_the_sources_within_rounding(padded: Path) -> None:
    torch.testing.assert_close(logits(written(padded)), logits(written(EXPERT)), atol=1e-4, rtol=0)


def test_its_greedy_text_is_the_sources(padded: Path) -> None:
    words = load_tokenizer(str(padded))
    one, other = written(EXPERT), written(padded)
    for prompt in PROMPTS:
        ids = torch.tensor([words.chat([{"role": "user", "content": prompt}])])
        texts = [
            model.generate(ids, do_sample=False, max_new_tokens=40).tolist()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue] - stub of `generate`
            for model in (one, other)
        ]
        assert texts[0] == texts[1]


def test_what_was_added_is_work_and_not_nothing(padded: Path) -> None:
    """Every added row that reads is random, so no kernel can skip it."""
    own: Any = AutoConfig.from_pretrained(str(EXPERT))
    state = written(padded).state_dict()
    last = f"model.layers.{own.num_hidden_layers + 2}."
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert (state[f"{last}{name}.weight"] != 0).all()
    assert (state[f"{last}mlp.down_proj.weight"] == 0).all()
    first = state["model.layers.0.mlp.gate_proj.weight"]
    assert (first[own.intermediate_size :] != 0).all()


def test_grouped_heads_keep_their_group(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    source, out = tmp_path / "source", tmp_path / "out"
    LlamaForCausalLM(config).save_pretrained(source)
    shape = own_shape(config, heads=9, groups=3, hidden=45)
    pad(str(source), out=out, shape=shape, dtype=torch.float32)
    torch.testing.assert_close(logits(written(out)), logits(written(source)), atol=1e-5, rtol=0)


def test_a_padded_model_is_labelled(padded: Path) -> None:
    assert is_padded(padded)
    assert not is_padded(EXPERT)
    label = json.loads((padded / "config.json").read_text())[LABEL]
    assert label["count"] == sum(weight.numel() for weight in written(padded).parameters())


@pytest.mark.parametrize("size", ["120M", "500M", "1.2B", "7B", "30B"])
def test_shapes_have_about_the_parameters_asked_for(size: str) -> None:
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    wanted = parse_parameters(size)
    shape = shape_for(wanted, config)
    attention = 2 * shape.hidden * config.head_dim * (shape.heads + shape.groups)
    layer = attention + 3 * shape.hidden * shape.intermediate
    count = shape.layers * layer + config.vocab_size * shape.hidden
    assert count == pytest.approx(wanted, rel=0.05)
    assert shape.heads % shape.groups == 0


@pytest.mark.parametrize("text", ["many", "", "-5M", "0", "M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedModel, match="no number of parameters"):
        parse_parameters(text)


def test_a_shape_that_is_too_small_is_refused(tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    shape = own_shape(config, layers=config.num_hidden_layers - 1)
    with pytest.raises(UnsupportedModel, match="layers"):
        pad(str(EXPERT), out=tmp_path, shape=shape)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="gpt2"):
        shape_for(120_000_000, AutoConfig.for_model("gpt2"))
