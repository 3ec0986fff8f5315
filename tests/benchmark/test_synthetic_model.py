"""A synthetic model gives the logits of its source, at the cost of a larger model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support.shipped_pair import SETTINGS
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from cascade.benchmark.synthetic_model import (
    LABEL,
    ModelShape,
    build,
    parse_parameters,
    shape_for,
    with_synthetic_expert,
    write,
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


def shape_of(config: Any, **changes: int) -> ModelShape:
    """Return the sizes of a model, some of them changed."""
    own: dict[str, int] = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
    }
    return ModelShape(**(own | changes))


def larger(config: Any) -> ModelShape:
    """Return a shape that is larger in every way, by factors that are no powers of two."""
    return ModelShape(
        hidden=6 * (config.num_key_value_heads + 2) * 16,
        intermediate=config.intermediate_size + 100,
        layers=config.num_hidden_layers + 3,
        heads=3 * (config.num_key_value_heads + 2),
        groups=config.num_key_value_heads + 2,
    )


def loaded(folder: Path) -> PreTrainedModel:
    """Return the model of a folder in float32."""
    return load(str(folder), device="cpu", dtype="float32").model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 1000, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped expert, a little larger in every way."""
    out = tmp_path_factory.mktemp("synthetic")
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    write(str(EXPERT), out=out, shape=larger(config), dtype=torch.float32)
    return out


def test_logits_are_the_sources_within_rounding(synthetic: Path) -> None:
    torch.testing.assert_close(logits(loaded(synthetic)), logits(loaded(EXPERT)), atol=1e-4, rtol=0)


def test_one_in_memory_has_the_weights_of_one_in_a_folder(synthetic: Path) -> None:
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    found = build(str(EXPERT), shape=larger(config), device="cpu", dtype=torch.float32)
    expected = loaded(synthetic).state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.state_dict().items())


def test_greedy_text_is_the_sources(synthetic: Path) -> None:
    tokenizer = load_tokenizer(str(synthetic))
    one, other = loaded(EXPERT), loaded(synthetic)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.chat([{"role": "user", "content": prompt}])])
        texts = [
            model.generate(ids, do_sample=False, max_new_tokens=40).tolist()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue] - stub of `generate`
            for model in (one, other)
        ]
        assert texts[0] == texts[1]


def test_added_weights_are_random_where_they_read(synthetic: Path) -> None:
    """A kernel cannot skip the added work."""
    own: Any = AutoConfig.from_pretrained(str(EXPERT))
    state = loaded(synthetic).state_dict()
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
    shape = shape_of(config, heads=9, groups=3, hidden=45)
    write(str(source), out=out, shape=shape, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded(out)), logits(loaded(source)), atol=1e-5, rtol=0)


def test_a_synthetic_model_is_labelled(synthetic: Path) -> None:
    assert LABEL not in json.loads((EXPERT / "config.json").read_text())
    label = json.loads((synthetic / "config.json").read_text())[LABEL]
    assert label["count"] == sum(weight.numel() for weight in loaded(synthetic).parameters())


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
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedModel, match="no number of parameters"):
        parse_parameters(text)


def test_a_shape_that_is_too_small_is_refused(tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(str(EXPERT))
    shape = shape_of(config, layers=config.num_hidden_layers - 1)
    with pytest.raises(UnsupportedModel, match="layers"):
        write(str(EXPERT), out=tmp_path, shape=shape)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="gpt2"):
        shape_for(120_000_000, AutoConfig.for_model("gpt2"))


def test_a_synthetic_expert_is_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = larger(AutoConfig.from_pretrained(str(EXPERT)))
    monkeypatch.setattr("cascade.benchmark.synthetic_model.shape_for", lambda *_: small)  # pyright: ignore[reportUnknownLambdaType] - any arguments
    first = with_synthetic_expert(SETTINGS, parameters="20M").expert.model_path
    weights = next(path for path in sorted(tmp_path.rglob("*.safetensors")))
    before = weights.stat().st_mtime_ns
    assert with_synthetic_expert(SETTINGS, parameters="20M").expert.model_path == first
    assert weights.stat().st_mtime_ns == before
    assert weights.parent.joinpath("config.json").exists()
