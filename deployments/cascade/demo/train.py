"""Train the pair from nothing: `python -m cascade.demo.train`.

One tokenizer, then two Llama-shaped models. The drafter reads mostly short answers, the expert
mostly formal ones; both learn from answers alone. The same seed gives the same documents at the
same step, so a run that was cut goes on where its last checkpoint stands.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cascade.demo.corpus import batches, documents
from cascade.demo.curves import draw_curves, write_losses
from cascade.demo.learning import Distilled, Loss, Run, answer_loss, optimizers
from cascade.demo.recipes import CONTEXT_TOKENS, PAIR, PairRecipe, Recipe
from cascade.demo.vocabulary import END, PAD, token_id, train_tokenizer

CHECKPOINT_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where models are made, and what they share."""

    tokenizer: PreTrainedTokenizerFast
    folder: Path
    seed: int = 0
    device: str = "cpu"


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder of models, checkpoints and losses")] = Path(
        "pair"
    ),
    only: Annotated[str, typer.Option(help="drafter or expert; both if empty")] = "",
    seed: Annotated[int, typer.Option(help="Of documents and first weights")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Train the tokenizer and both models and write them as Hugging Face folders."""
    torch.set_num_threads(threads)
    tokenizer = find_tokenizer(out / "tokenizer", recipes=PAIR, seed=seed)
    workshop = Workshop(tokenizer=tokenizer, folder=out, seed=seed, device=device)
    for name, recipe in PAIR.models.items():
        if only in ("", name):
            model = train(name, recipe, workshop=workshop, loss=_loss(recipe, workshop))
            save(model, tokenizer=tokenizer, folder=out / name)
    draw_curves(out)


def find_tokenizer(folder: Path, *, recipes: PairRecipe, seed: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `folder`, trained and written there if there is none."""
    if not folder.exists():
        # Both styles in equal parts: the two models share one vocabulary.
        drawn = islice(documents(f"{seed}/tokenizer", formal=0.5), 20_000)
        texts = (text for parts in drawn for text, *_ in parts)
        tokenizer = train_tokenizer(texts, size=recipes.vocabulary, context=CONTEXT_TOKENS)
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train(
    name: str, recipe: Recipe, *, workshop: Workshop, loss: Loss = answer_loss
) -> LlamaForCausalLM:
    """Return the model of `recipe`, going on from its checkpoint if there is one."""
    torch.manual_seed(workshop.seed)
    model = LlamaForCausalLM(_config(recipe, workshop.tokenizer)).train()
    torch.nn.Module.to(model, device=workshop.device)
    run = Run(model=model, optimizers=optimizers(model, rate=recipe.learning_rate))
    checkpoint = workshop.folder / f"{name}.checkpoint.pt"
    run.restore(checkpoint)
    with _progress() as progress:
        bar = progress.add_task(name, total=recipe.steps, completed=run.step, loss="")
        while run.step < recipe.steps:
            run.schedule(steps=recipe.steps)
            seed = f"{workshop.seed}/{name}/{run.step}"
            drawn = batches(workshop.tokenizer, recipe, seed=seed)
            last = run.learn([batch.to(workshop.device) for batch in drawn], loss=loss)
            progress.update(bar, advance=1, loss=f"{last:.3f}")
            if run.step % CHECKPOINT_STEPS == 0:
                run.store(checkpoint)
                progress.console.log(f"{name} step {run.step} loss {last:.3f}")
    write_losses(workshop.folder, name=name, losses=run.losses)
    return model.eval()


def save(model: LlamaForCausalLM, *, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete Hugging Face folder, weights in bfloat16."""
    model.generation_config = GenerationConfig(
        eos_token_id=token_id(tokenizer, END), pad_token_id=token_id(tokenizer, PAD)
    )
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(recipe: Recipe, workshop: Workshop) -> Loss:
    """Return what `recipe` learns by; a distilled model needs the expert's folder."""
    if not recipe.distilled:
        return answer_loss
    teacher = LlamaForCausalLM.from_pretrained(workshop.folder / "expert", dtype=torch.float32)
    torch.nn.Module.to(teacher.eval(), device=workshop.device)
    return Distilled(teacher=teacher, share=recipe.distilled)


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
