"""Train the pair from nothing: `python -m cascade.demo.train`.

One tokenizer, then two Llama-shaped models. The drafter reads mostly short answers, the expert
mostly formal ones; both learn from answers alone. The same seed gives the same documents at the
same step, so a run that was cut goes on where its last checkpoint stands.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cascade.training.corpus import (
    END,
    IGNORED,
    PAD,
    Batch,
    batches,
    documents,
    token_id,
    train_tokenizer,
)
from cascade.training.curves import draw_curves, write_losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is made."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    formal: float  # share of answers in the formal style
    learning_rate: float
    documents: int = 96  # of one step
    groups: int = 6  # of one step, each of documents of like length
    distilled: float = 0.0  # share of the loss that is learned from the expert's distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe:
    """How a pair is made; `models` are trained in order, a distilled one after the expert."""

    vocabulary: int  # at most; a corpus of few words fills less
    models: Mapping[str, Recipe]


PAIR = PairRecipe(
    vocabulary=4096,
    models=MappingProxyType(
        {
            "expert": Recipe(
                hidden=320, layers=6, heads=5, intermediate=1024, steps=1500, formal=0.85,
                learning_rate=4e-3,
            ),
            "drafter": Recipe(
                hidden=192, layers=2, heads=3, intermediate=512, steps=380, formal=0.3,
                learning_rate=4e-3, distilled=0.5,
            ),
        }
    ),
)  # fmt: skip

_WARM_UP_STEPS = 50


class Loss(Protocol):
    """What a model is to make small, summed over the labels of a batch, in nats."""

    def __call__(self, model: LlamaForCausalLM, batch: Batch) -> Tensor:
        """Return the loss of `model` on `batch`."""
        ...


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the cross-entropy of the answers; logits exist only where there is a label."""
    logits_NV = answer_logits(model, batch)
    return functional.cross_entropy(logits_NV, answer_labels(batch), reduction="sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """Cross-entropy, mixed with the divergence of the teacher's distributions from the model's.

    Where the styles part, a token is left to the cross-entropy, since the drafter is to keep its
    own style. Everywhere else agreeing with the teacher is what makes a drafter good.
    """

    teacher: LlamaForCausalLM
    share: float

    def __call__(self, model: LlamaForCausalLM, batch: Batch) -> Tensor:
        """Return the mixed loss."""
        logits_NV = answer_logits(model, batch).float()
        with torch.no_grad():
            wanted_NV = answer_logits(self.teacher, batch).float().log_softmax(-1)
        hard_N = functional.cross_entropy(logits_NV, answer_labels(batch), reduction="none")
        soft_N = functional.kl_div(
            logits_NV.log_softmax(-1), wanted_NV, reduction="none", log_target=True
        ).sum(-1)
        share_N = self.share * unstyled(batch)
        return ((1 - share_N) * hard_N + share_N * soft_N).sum()


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the logits (N, V) that predict the labels."""
    hidden = model.model(input_ids=batch.tokens_BT).last_hidden_state[:, :-1]
    return model.lm_head(hidden[batch.labels_BT[:, 1:] != IGNORED])


def answer_labels(batch: Batch) -> Tensor:
    """Return the labels (N)."""
    labels = batch.labels_BT[:, 1:]
    return labels[labels != IGNORED]


def unstyled(batch: Batch) -> Tensor:
    """Return 0 for each label (N) where the answer could go on in another style, else 1."""
    return (~batch.styled_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORED]).float()


@dataclass(slots=True, kw_only=True)
class Run:
    """A model on its way; everything that a checkpoint must hold."""

    model: LlamaForCausalLM
    optimizers: Sequence[torch.optim.Optimizer]
    losses: list[float] = field(default_factory=list[float])  # of each step, nats per answer token

    @property
    def step(self) -> int:
        """Return how many steps were taken."""
        return len(self.losses)

    def learn(self, groups: Sequence[Batch], *, loss: Loss) -> float:
        """Take one step on all groups together and return its loss per answer token."""
        tokens = sum(len(answer_labels(batch)) for batch in groups)
        total = 0.0
        for batch in groups:
            device = batch.tokens_BT.device.type
            with torch.autocast(device, torch.bfloat16):
                part = loss(self.model, batch) / tokens
            part.backward()
            total += part.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        return total

    def schedule(self, *, steps: int) -> None:
        """Set the rates of the next step: a short ramp up, then a straight line to nothing."""
        share = min((self.step + 1) / _WARM_UP_STEPS, (steps - self.step) / steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak", group["lr"])
                group["lr"] = group["peak"] * share

    def store(self, path: Path) -> None:
        """Write a checkpoint; a run that is killed meanwhile keeps the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"losses": self.losses, "model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state, fresh)
        fresh.replace(path)

    def restore(self, path: Path) -> None:
        """Take up a checkpoint, if there is one."""
        if not path.exists():
            return
        stored: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(stored["model"])
        for optimizer, state in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.losses = stored["losses"]


def optimizers(model: LlamaForCausalLM, *, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the hidden matrices and AdamW for everything else."""
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim > 1]
    chosen = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


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
