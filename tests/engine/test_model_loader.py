from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.architectures import VOCABULARY, build
from tests.support.toy_tokenizers import byte_level
from transformers import AutoConfig, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cascade.engine import tokenizer
from cascade.engine.model_loader import context_length, load
from cascade.engine.model_pair import ModelSource, load_pair
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Damage: TypeAlias = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = copied(checkpoint, tmp_path_factory.mktemp("whole"))
    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(folder)
    return folder


def copied(checkpoint: Path, folder: Path) -> Path:
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_checkpoint_is_loaded_as_it_was_saved(checkpoint: Path) -> None:
    loaded = load(str(checkpoint), device="cpu")

    assert loaded.vocabulary == VOCABULARY
    assert loaded.context_length == 512
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


def test_a_model_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    LlamaModel(LlamaConfig(hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=r"no causal .* head \(it is a LlamaModel\)"):
        load(str(tmp_path))


def test_a_model_type_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    CONFIG_MAPPING["vit"]().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="no causal language model of type 'vit'"):
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


def test_the_device_is_chosen_or_named(checkpoint: Path) -> None:
    chosen = "cuda" if torch.cuda.is_available() else "cpu"

    assert load(str(checkpoint)).model.device.type == chosen
    assert load(str(checkpoint), device="meta").model.device.type == "meta"


def test_a_saved_configuration_has_its_context_length(checkpoint: Path) -> None:
    assert context_length(AutoConfig.from_pretrained(checkpoint)) == 512


def start(folder: Path) -> None:
    """Load what a replica loads."""
    load(str(folder), device="cpu")
    tokenizer.load(str(folder))


def written(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def stated(**settings: Any) -> Damage:
    """Change config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def quantised(method: str, **settings: Any) -> Damage:
    return stated(quantization_config={"quant_method": method, **settings})


def weighted(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    """Change the tensors."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def spoilt(value: float, name: str, place: tuple[int, ...]) -> Damage:
    return weighted(lambda tensors: tensors[name].__setitem__(place, value))


def without(*files: str, then: Damage = lambda _: None) -> Damage:
    def remove(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()
        then(folder)

    return remove


def multimodal(kind: str, name: str) -> Damage:
    def replace(folder: Path) -> None:
        config = CONFIG_MAPPING[kind]()
        config.architectures = [name]
        config.save_pretrained(folder)

    return replace


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"
UP = "model.layers.1.mlp.up_proj.weight"
TEXTS = (b"{not json", b"", b"[1, 2]", b"null", b'{"a": "\xff"}')
READ_BY_BOTH = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("file", READ_BY_BOTH)
def test_a_broken_file_is_refused_by_tier_and_router(
    whole: Path, tmp_path: Path, file: str, content: bytes
) -> None:
    written(file, content)(copied(whole, tmp_path))

    with pytest.raises(UnsupportedModel, match=r"no JSON|No tokenizer at"):
        start(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"no JSON|No tokenizer at"):
        load_pair(ModelSource(name=str(whole)), ModelSource(name=str(tmp_path)))


# Kinds that nothing here knows; see test_quantisation for the others.
LIBRARIES = {
    "quanto": ("quanto", {"weights": "int8"}),
    "hqq": ("hqq", {"weights": "int8"}),
    "mxfp4": ("accelerate", {}),
}


@pytest.mark.parametrize("method", LIBRARIES)
def test_a_quantised_checkpoint_without_its_library_is_refused(
    whole: Path, tmp_path: Path, method: str
) -> None:
    library, settings = LIBRARIES[method]
    if find_spec(library.replace(".", "_").replace("quanto", "optimum")):
        pytest.skip(f"{library} is installed")
    quantised(method, **settings)(copied(whole, tmp_path))

    with pytest.raises(UnsupportedModel, match=f"(?i)quantised: {method}.*{library}.*unquantised"):
        load(str(tmp_path), device="cpu")


NOT_SERVED: dict[str, tuple[Damage, str]] = {
    "quantised in an unknown way": (
        quantised("modelopt"),
        "quantised with modelopt, which this transformers does not know",
    ),
    "integers without a word": (
        weighted(lambda all_: all_.update({UP: all_[UP].to(torch.int8)})),
        f"stores {UP} as I8, but its config.json has no quantization_config",
    ),
    "NaN": (spoilt(float("nan"), UP, (0, 0)), rf"NaN or infinite \({UP}\)"),
    "infinity": (spoilt(float("inf"), "model.norm.weight", (3,)), "NaN or infinite"),
    "NaN in one token": (
        spoilt(float("nan"), "model.embed_tokens.weight", (210, 1)),
        "NaN or infinite",
    ),
    "another size": (
        stated(intermediate_size=95),
        r"mlp.* is \[.*96.*\], but \[.*95.*\] by its config",
    ),
    "an unknown activation": (stated(hidden_act="abacus"), "cannot be loaded: KeyError 'abacus'"),
    "no heads": (stated(num_attention_heads=0), "not one transformers can read"),
    "an unknown dtype": (stated(dtype="abacus"), "not one transformers can read: .*abacus"),
    "a classifier": (
        stated(architectures=["LlamaForSequenceClassification"]),
        "serve a .* LlamaForCausalLM",
    ),
    "a Git LFS pointer": (written("model.safetensors", POINTER), "git lfs pull"),
    "a broken adapter": (
        written("adapter_config.json", b"{"),
        "adapter_config.json of .* is no JSON",
    ),
    "no tokenizer": (without("tokenizer.json"), "No tokenizer .* it has no tokenizer.json"),
    "a SentencePiece tokenizer": (
        without("tokenizer.json", then=written("tokenizer.model", b"\n\x07\n\x05<unk>")),
        r"a SentencePiece model \(tokenizer.model\); pip install sentencepiece",
    ),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_a_checkpoint_that_cannot_be_served_is_refused(
    whole: Path, tmp_path: Path, name: str
) -> None:
    damage, reason = NOT_SERVED[name]
    damage(copied(whole, tmp_path))

    with pytest.raises(UnsupportedModel, match=reason):
        start(tmp_path)


NOT_CONFIGURED: dict[str, tuple[Damage, str]] = {
    "an adapter beside weights": (
        written("adapter_config.json", ADAPTER),
        "an adapter .* of org/base, .* merge",
    ),
    "an adapter": (
        without("config.json", then=written("adapter_config.json", ADAPTER)),
        "an adapter .* of org/base, .* merge",
    ),
    "nothing": (without("config.json"), "No model at .* it has no config.json"),
    "GGUF": (
        without("config.json", then=written("a.gguf", b"GGUF")),
        "GGUF weights; convert",
    ),
    "Mistral's format": (
        without("config.json", then=written("params.json", b"{}")),
        "in Mistral's own format",
    ),
    "a model that only compares texts and images": (
        multimodal("clip", "CLIPModel"),
        r"is a CLIPModel, and .* no causal language model of type 'clip'",
    ),
    "a part of a model that reads images": (
        multimodal("llava", "LlavaModel"),
        r"it is a LlavaModel\); serve a checkpoint of LlavaForConditionalGeneration",
    ),
    "a hybrid that reads images": (
        multimodal("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        "Qwen3_5ForConditionalGeneration keeps a recurrent state",
    ),
}


@pytest.mark.parametrize("name", NOT_CONFIGURED)
def test_what_the_configuration_rules_out_the_router_refuses_too(
    whole: Path, tmp_path: Path, name: str
) -> None:
    damage, reason = NOT_CONFIGURED[name]
    damage(copied(whole, tmp_path))

    with pytest.raises(UnsupportedModel, match=reason):
        load(str(tmp_path), device="cpu")
    with pytest.raises(UnsupportedModel, match=reason):
        load_pair(ModelSource(name=str(whole)), ModelSource(name=str(tmp_path)))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(checkpoint: Path, device: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"is unknown; use auto|cannot be loaded to device"):
        load(str(checkpoint), device=device)
