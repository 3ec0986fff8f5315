"""Train the pair from nothing: `python -m cascade.demo.train`.

One tokenizer, then two Llama-shaped models. The drafter reads mostly short answers, the expert
mostly formal ones; both learn from answers alone. The same seed gives the same documents at the
same step, so a run that was cut goes on where its last checkpoint stands.

Hidden matrices move by Muon (Jordan et al., 2024), everything else by AdamW.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cascade.demo.corpus import IGNORED, Batch, batches, documents
from cascade.demo.vocabulary import END, PAD, token_id, train_tokenizer

_WARM_UP_STEPS = 50
_CHECKPOINT_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is made."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    formal: float  # share of answers in the formal style
    documents: int = 64  # of one step
    groups: int = 4  # of one step, each of documents of like length
    learning_rate: float = 4e-3


VOCABULARY = 1024
CONTEXT_TOKENS = 1024
RECIPES = {
    "drafter": Recipe(hidden=64, layers=2, heads=2, intermediate=160, steps=1000, formal=0.3),
    "expert": Recipe(hidden=128, layers=4, heads=4, intermediate=448, steps=1400, formal=0.85),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the two models")] = Path("pair"),
    only: Annotated[str, typer.Option(help="drafter or expert; both if empty")] = "",
    seed: Annotated[int, typer.Option(help="Of documents and first weights")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads")] = 2,
) -> None:
    """Train the tokenizer and both models and write them as Hugging Face folders."""
    torch.set_num_threads(threads)
    tokenizer = _tokenizer(out / "tokenizer", seed=seed)
    for name, recipe in RECIPES.items():
        if only not in ("", name):
            continue
        model = train(name, recipe=recipe, tokenizer=tokenizer, seed=seed, folder=out)
        save(model, tokenizer=tokenizer, folder=out / name)


def train(
    name: str,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    folder: Path,
) -> LlamaForCausalLM:
    """Return the model of `recipe`, going on from its checkpoint in `folder` if there is one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(recipe, tokenizer)).train()
    optimizers = _optimizers(model, recipe)
    checkpoint = folder / f"{name}.checkpoint.pt"
    first = _restore(checkpoint, model=model, optimizers=optimizers)
    with _progress() as progress:
        bar = progress.add_task(name, total=recipe.steps, completed=first, loss="")
        for step in range(first, recipe.steps):
            groups = batches(
                tokenizer,
                seed=f"{seed}/{name}/{step}",
                formal=recipe.formal,
                size=recipe.documents // recipe.groups,
                count=recipe.groups,
            )
            _schedule(optimizers, step=step, steps=recipe.steps)
            loss = _learn(model, groups, optimizers=optimizers)
            progress.update(bar, advance=1, loss=f"{loss:.3f}")
            if (step + 1) % _CHECKPOINT_STEPS == 0:
                _store(checkpoint, model=model, optimizers=optimizers, step=step + 1)
                progress.console.log(f"{name} step {step + 1} loss {loss:.3f}")
    return model.eval()


def save(model: LlamaForCausalLM, *, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete Hugging Face folder, weights in bfloat16."""
    model.generation_config = GenerationConfig(
        eos_token_id=token_id(tokenizer, END), pad_token_id=token_id(tokenizer, PAD)
    )
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the summed cross-entropy of the answers; logits exist only where there is a label."""
    hidden = model.model(input_ids=batch.tokens_BT).last_hidden_state[:, :-1]
    labels = batch.labels_BT[:, 1:]
    counted = labels != IGNORED
    return functional.cross_entropy(
        model.lm_head(hidden[counted]), labels[counted], reduction="sum"
    )


def _learn(
    model: LlamaForCausalLM, groups: list[Batch], *, optimizers: list[torch.optim.Optimizer]
) -> float:
    """Take one step and return the loss in nats per answer token."""
    tokens = sum(int((batch.labels_BT[:, 1:] != IGNORED).sum()) for batch in groups)
    total = 0.0
    for batch in groups:
        loss = answer_loss(model, batch) / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim > 1]
    chosen = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    rate = recipe.learning_rate
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _schedule(optimizers: list[torch.optim.Optimizer], *, step: int, steps: int) -> None:
    """Set the rates: a short ramp up, then a straight line to nothing."""
    share = min((step + 1) / _WARM_UP_STEPS, (steps - step) / (steps - _WARM_UP_STEPS))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * share


def _tokenizer(folder: Path, *, seed: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `folder`, trained and written there if there is none."""
    if not folder.exists():
        tokenizer = train_tokenizer(_texts(seed), size=VOCABULARY, context=CONTEXT_TOKENS)
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _texts(seed: int) -> list[str]:
    """Return what the tokenizer learns from: both styles in equal parts."""
    drawn = islice(documents(f"{seed}/tokenizer", formal=0.5), 20_000)
    return [text for parts in drawn for text, _ in parts]


def _store(
    path: Path, *, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    states = [optimizer.state_dict() for optimizer in optimizers]
    fresh = path.with_suffix(".new")
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, fresh)
    fresh.replace(path)


def _restore(
    path: Path, *, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Load a checkpoint and return the step to go on with; 0 if there is none."""
    if not path.exists():
        return 0
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(stored["model"])
    for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return stored["step"]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )


if __name__ == "__main__":
    sys.exit(typer.run(main))
