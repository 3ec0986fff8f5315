from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.architectures import VOCABULARY, build
from transformers import AutoConfig, LlamaConfig, LlamaModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cascade.engine.model_loader import adopt, context_length, load
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


def copied(checkpoint: Path, folder: Path) -> Path:
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_checkpoint_is_loaded_as_it_was_saved(checkpoint: Path) -> None:
    loaded = load(str(checkpoint), device="cpu")

    assert loaded.vocabulary == VOCABULARY
    assert loaded.context_length == 512
    assert loaded.stop_ids == (2,)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.model(tokens).logits, build("llama")(tokens).logits)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_weights_have_the_requested_dtype(
    checkpoint: Path, dtype: str, expected: torch.dtype
) -> None:
    assert load(str(checkpoint), device="cpu", dtype=dtype).model.dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "nonsense", "nn"])
def test_an_unknown_dtype_is_refused(checkpoint: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedModel, match="use auto, float32, bfloat16 or float16"):
        load(str(checkpoint), device="cpu", dtype=dtype)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="No model at"):
        load(str(tmp_path / "nothing"))


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))

    with pytest.raises(UnsupportedModel, match="configuration"):
        load(str(tmp_path))


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()

    with pytest.raises(UnsupportedModel, match="convert them to safetensors"):
        load(str(tmp_path))


def test_a_configuration_without_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(UnsupportedModel, match=r"no \*\.safetensors"):
        load(str(tmp_path))


def test_corrupt_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")

    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load(str(tmp_path))


def test_missing_tensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UnsupportedModel, match=r"lack 1 tensors \(lm_head.weight\)"):
        load(str(tmp_path))


def test_an_inconsistent_configuration_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_attention_heads"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(UnsupportedModel, match="not one transformers can read"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(tmp_path: Path, kind: str) -> None:
    CONFIG_MAPPING[kind](is_encoder_decoder=True).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load(str(tmp_path))


def test_a_model_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    LlamaModel(LlamaConfig(hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=r"no causal .* head \(it is a LlamaModel\)"):
        load(str(tmp_path))


def test_a_model_type_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    CONFIG_MAPPING["vit"]().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="no causal language model head"):
        load(str(tmp_path))


def test_code_that_comes_with_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    copied(checkpoint, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "abacus"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("open(__file__ + '.ran', 'w')\n")

    with pytest.raises(UnsupportedModel):
        load(str(tmp_path))

    assert not list(tmp_path.glob("*.ran"))


@pytest.mark.parametrize(
    ("name", "tokens"), [("gpt2", 512), ("mpt", 512), ("bloom", None), ("dynamic", 512)]
)
def test_the_context_length_is_read_under_any_name(name: str, tokens: int | None) -> None:
    assert context_length(build(name).config) == tokens


@pytest.mark.parametrize(("stated", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_stop_ids_are_a_tuple(stated: list[int] | int | None, ids: tuple[int, ...]) -> None:
    model: PreTrainedModel = build("llama")
    assert model.generation_config
    model.generation_config.eos_token_id = stated

    assert adopt(model).stop_ids == ids


def test_the_device_is_chosen_or_named(checkpoint: Path) -> None:
    chosen = "cuda" if torch.cuda.is_available() else "cpu"

    assert load(str(checkpoint)).model.device.type == chosen
    assert load(str(checkpoint), device="meta").model.device.type == "meta"


def test_a_saved_configuration_has_its_context_length(checkpoint: Path) -> None:
    assert context_length(AutoConfig.from_pretrained(checkpoint)) == 512
