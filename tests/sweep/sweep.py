"""Which model types of the installed transformers are served, and how: a tiny model of each.

Each is built with random weights from a tiny configuration, saved, loaded as a replica loads it,
and run by an engine: prefills, blocks and rollbacks of sessions of up to 190 tokens, which is
beyond every window, chunk and RoPE length of its configuration. All logits are compared with those
of the model's own forward pass.

    python -m tests.sweep.sweep --out docs/models.md    # all types, several minutes: `poe sweep`
    python -m tests.sweep.sweep llama qwen3_vl          # some, to the terminal
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from tests.engine.harness import EngineHarness, ragged_scenario
from tests.sweep.tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

from cascade.engine.model_loader import load, required_attention
from cascade.engine.settings import EngineSettings
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

_PARAMETERS = 20_000_000  # of a tiny model, at most
_LIMIT_S = 120  # for one type
_TOLERANCE = 1e-3  # of the largest logit
_SOURCE = tuple(3 + 7 * i % 200 for i in range(40))  # what an encoder reads

TEXT, MORE, ENCODING = "text", "text and more", "encoder-decoder"
_CLASSES: dict[str, Any] = {
    TEXT: AutoModelForCausalLM,
    MORE: AutoModelForMultimodalLM,
    ENCODING: AutoModelForSeq2SeqLM,
}
_HOW = {
    "CpuLlamaRunner": "lean",
    "VarlenRunner": "flat",
    "PaddedRunner": "padded",
    "EncoderDecoderRunner": "encoder-decoder",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model type."""

    kind: str  # as in config.json
    group: str
    model: str  # class
    served: str = ""  # path
    refused: str = ""  # the error's message
    untried: str = ""  # why no tiny model could be built
    wrong: str = ""  # an error in the served logits

    @property
    def text(self) -> str:
        """Return what the table says."""
        if self.wrong:
            return f"**wrong**: {self.wrong}"
        if self.untried:
            return f"not tried: {self.untried}"
        return f"served, {self.served} path" if self.served else f"refused: {self.refused}"


def model_types() -> list[tuple[str, str]]:
    """Return every model type with a language model head, each with the group it belongs to."""
    texts: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    more: Any = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    encoding: Any = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return [
        *((kind, TEXT) for kind in texts if kind not in encoding),
        # A type may have a model that reads text alone besides one that reads more.
        *((kind, MORE) for kind in more if texts.get(kind) != more[kind]),
        *((kind, ENCODING) for kind in encoding if kind not in more),
    ]


def sweep_type(kind: str, group: str) -> Outcome:
    """Return what becomes of a tiny model of a type."""
    torch.manual_seed(0)
    name = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _time_limit():
                model = _built(_CLASSES[group], tiny_config(kind))
                name = type(model).__name__
                model.save_pretrained(folder)
                _try(model)
        except Exception as error:  # noqa: BLE001 - any type's code may fail in its own way
            found = _refused_unrun(folder) or {"untried": _first_line(error)}
            return Outcome(kind=kind, group=group, model=name, **found)
        try:
            with _time_limit():
                found = _served(model, folder)
        except UnsupportedModel as error:
            found = {"refused": _message(error, folder)}
        except Exception as error:  # noqa: BLE001 - as above
            found = {"wrong": _first_line(error)}
    return Outcome(kind=kind, group=group, model=name, **found)


def _refused_unrun(folder: str) -> dict[str, str]:
    """Return why a model that does not run is refused before it would; empty if it is not."""
    if Path(folder, "config.json").exists():
        try:
            load(folder, device="cpu")
        except UnsupportedModel as error:
            return {"refused": _message(error, folder)}
    return {}


def _message(error: UnsupportedModel, folder: str) -> str:
    return " ".join(error.message.replace(repr(folder), "it").split())


def _served(model: Any, folder: str) -> dict[str, str]:
    """Return how a model is served, or what is wrong with its logits.

    Raises:
        UnsupportedModel: It is refused.
    """
    loaded = load(folder, device="cpu")
    # Read again, since some weights are computed and not saved.
    model = type(model).from_pretrained(folder).eval()
    sources = dict.fromkeys("abcdef", _SOURCE) if model.config.is_encoder_decoder else None
    settings = EngineSettings(cache_tokens=1024)
    harness = EngineHarness(model, settings, loaded=loaded, sources=sources)
    runner: Any = harness.engine.runner
    how = _HOW[type(runner).__name__]
    ragged_scenario(harness)
    if not harness.worst <= _TOLERANCE * harness.largest:
        return {"wrong": f"off by {harness.worst:.1e} of {harness.largest:.1f} on the {how} path"}
    alone = getattr(runner, "_alone", False)
    return {"served": how + (", one session at a time" if alone else "")}


def _built(kind: Any, config: Any) -> Any:
    """Return a model with weights large enough for its logits to differ."""
    with torch.device("meta"):
        shape = kind.from_config(config)
    parameters = sum(weight.numel() for weight in shape.parameters())
    if parameters > _PARAMETERS:
        raise ValueError(f"its tiny model has {parameters / 1e6:.0f}M parameters")
    model = kind.from_config(config, attn_implementation=required_attention(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def _try(model: Any) -> None:
    """Raise RuntimeError if numbers of the configuration do not agree with each other."""
    with suppress(TypeError, ValueError, AttributeError), torch.inference_mode():
        model(input_ids=torch.tensor([[3, 4, 5]]))  # those that want an image raise others


@contextmanager
def _time_limit() -> Generator[None]:
    def expire(*_: object) -> None:
        raise TimeoutError(f"it takes more than {_LIMIT_S} seconds")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}" if lines else repr(error)


def main(arguments: Sequence[str]) -> int:
    """Sweep, print or write the table, and return 1 if a model is served wrongly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; by default all")
    parser.add_argument("--out", type=Path, help="the page to write")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    rows = read_rows(chosen.out) if chosen.out and chosen.types else {}
    has_wrong = False
    for kind, group in model_types():
        if chosen.types and kind not in chosen.types:
            continue
        found = sweep_type(kind, group)
        has_wrong |= bool(found.wrong)
        rows[kind, group] = Row(model=found.model, text=found.text)
        print(f"{kind}, {group}: {found.text}", flush=True)  # noqa: T201 - what the command is for
        if chosen.out:
            chosen.out.write_text(page(rows), encoding="utf-8")
        gc.collect()
    return int(has_wrong)


class Row(NamedTuple):
    """What the page says of a model type."""

    model: str  # class
    text: str


def read_rows(file: Path) -> dict[tuple[str, str], Row]:
    """Return the rows of a page, by model type and group."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    cells = [[one.strip() for one in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return {(one[0], one[1]): Row(one[2], one[3]) for one in cells[2:]}


def page(rows: Mapping[tuple[str, str], Row]) -> str:
    """Return the page of documentation."""
    groups = (TEXT, MORE, ENCODING)
    ordered = sorted(rows.items(), key=lambda one: (groups.index(one[0][1]), one[0][0]))
    served = sum(row.text.startswith("served") for row in rows.values())
    table = [
        f"| {kind} | {group} | {row.model} | {row.text.replace('|', '/')} |"
        for (kind, group), row in ordered
    ]
    return _PAGE.format(
        version=transformers.__version__, served=served, count=len(rows), table="\n".join(table)
    )


_PAGE = """# Models

Which model types are served is decided when a model is loaded: it runs on the fastest path whose
logits are those of the model's own forward pass, or it is refused with the reason. `poe sweep`
tries a tiny random model of every type of the installed transformers (here {version}) that has a
language model head, and writes this page. Each is saved, loaded as a replica loads it, and run in
blocks with rollbacks up to 190 tokens, beyond every window, chunk and RoPE length of its
configuration; all logits are compared.

{served} of {count} are served. *text and more* are checkpoints that read images or sound besides
text: they are loaded as they are and given text alone, and a request with an image is refused
with a 400. Layers that keep a recurrent state cannot be rolled back when drafted tokens are
rejected, so models with such layers are refused. *not tried*: no tiny model could be made, which
says nothing about a real one. Types whose code comes with the checkpoint are not listed; they
need `trust_remote_code`.

Paths, fastest first: *lean* is our own forward pass for Llama-like models on CPUs; *flat* runs
the model's with our attention over all sessions at once; *padded* runs it with its own attention
over padded sessions, or *one session at a time*.

| type | reads | class | served or refused |
| --- | --- | --- | --- |
{table}
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
