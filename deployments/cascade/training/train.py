"""Trains the pair from random weights: `python -m cascade.training.train`.

One tokenizer, then two models, of Llama's architecture or T5's. The drafter reads mostly short
answers, the expert mostly formal ones; the loss covers only answers. The same seed gives the same
documents at the same step, so an interrupted run resumes from its last checkpoint.

Shapes: `B` documents of a batch, `T` tokens, `N` labels of a batch, `V` vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import typer
from rich.progress import Progress, TextColumn
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cascade.engine.backends.widened_linear import helps
from cascade.evaluation.scoring import import_extra
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
from cascade.training.recipes import PAIRS, Architecture, Recipe

CONTEXT_TOKENS = 1024

VOCABULARY_TOKENS = 4096  # at most; a corpus of few words fills less

TOKENIZER_DOCUMENTS = 20_000

CHECKPOINT_STEPS = 50

_WARM_UP_STEPS = 50

_SMOOTHED_STEPS = 25

_LOSSES_SUFFIX = ".losses.json"


# The loss of a model on a batch, in nats, summed over the labels.
Loss: TypeAlias = Callable[[PreTrainedModel, Batch], Tensor]


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the cross-entropy of the answers."""
    logits_NV = answer_logits(model, batch)
    return functional.cross_entropy(logits_NV, answer_labels(batch), reduction="sum")


def distillation_loss(
    model: PreTrainedModel, batch: Batch, *, teacher: PreTrainedModel, share: float
) -> Tensor:
    """Return cross-entropy mixed with the divergence from the teacher's distributions.

    A token at which the styles diverge counts as cross-entropy alone, since the drafter keeps its
    own style. Everywhere else a drafter is better the more it agrees with the teacher.

    Args:
        model: Which model learns.
        batch: What it learns from.
        teacher: The expert.
        share: Of the divergence, 0 to 1.
    """
    logits_NV = answer_logits(model, batch).float()
    with torch.no_grad():
        teacher_NV = answer_logits(teacher, batch).float().log_softmax(-1)
    hard_N = functional.cross_entropy(logits_NV, answer_labels(batch), reduction="none")
    soft_N = functional.kl_div(
        logits_NV.log_softmax(-1), teacher_NV, reduction="none", log_target=True
    ).sum(-1)
    share_N = share * (~answer_choices(batch)).float()
    return ((1 - share_N) * hard_N + share_N * soft_N).sum()


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits (N, V) that predict the labels, computed only where there is a label."""
    is_label = batch.labels_BT[:, 1:] != IGNORED
    if isinstance(model, LlamaForCausalLM):
        hidden = model.model(input_ids=batch.tokens_BT).last_hidden_state[:, :-1]
        return model.lm_head(hidden[is_label])
    logits_BTV = model(
        input_ids=batch.source_BS,
        attention_mask=batch.source_BS != model.config.pad_token_id,
        decoder_input_ids=batch.tokens_BT[:, :-1],
    ).logits
    return logits_BTV[is_label]


def answer_labels(batch: Batch) -> Tensor:
    """Return the labels (N)."""
    labels = batch.labels_BT[:, 1:]
    return labels[labels != IGNORED]


def answer_choices(batch: Batch) -> Tensor:
    """Return for each label (N) whether the answer could have continued in the other style."""
    return batch.is_choice_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORED]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where models are trained, and what they share."""

    tokenizer: PreTrainedTokenizerFast
    folder: Path
    seed: int = 0
    device: str = "cpu"


def main(  # noqa: PLR0913 - one parameter an option
    *,
    out: Annotated[Path, typer.Option(help="Folder of models, checkpoints and losses")] = Path(
        "pair"
    ),
    architecture: Annotated[
        Architecture, typer.Option(help="Of the pair: causal is Llama, seq2seq is T5")
    ] = Architecture.CAUSAL,
    only: Annotated[str, typer.Option(help="drafter or expert; both if empty")] = "",
    seed: Annotated[int, typer.Option(help="Of documents and first weights")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Train the tokenizer and both models and write them as Hugging Face folders."""
    import_extra("matplotlib")  # for the learning curves; fails now rather than after training
    torch.set_num_threads(threads)
    tokenizer = find_tokenizer(
        out / "tokenizer", size=VOCABULARY_TOKENS, seed=seed, architecture=architecture
    )
    workspace = Workspace(tokenizer=tokenizer, folder=out, seed=seed, device=device)
    for name, recipe in PAIRS[architecture].items():
        if only in ("", name):
            loss = answer_loss
            if recipe.distilled:
                kind = type(new_model(recipe, tokenizer=tokenizer))
                teacher = kind.from_pretrained(out / "expert", dtype=torch.float32)
                torch.nn.Module.to(teacher.eval(), device=device)
                loss = partial(distillation_loss, teacher=teacher, share=recipe.distilled)
            model = train(name, recipe, workspace=workspace, loss=loss)
            save(model, tokenizer=tokenizer, folder=out / name)
    draw_curves(out)


def find_tokenizer(
    folder: Path, *, size: int, seed: int, architecture: Architecture = Architecture.CAUSAL
) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `folder`; if there is none, train one and write it there.

    Args:
        folder: Of the tokenizer.
        size: Tokens of its vocabulary, at most.
        seed: Of the documents.
        architecture: Of the models.
    """
    if not folder.exists():
        # Both styles in equal parts: the two models share one vocabulary.
        sampled = islice(
            documents(f"{seed}/tokenizer", formal=0.5, architecture=architecture),
            TOKENIZER_DOCUMENTS,
        )
        texts = (part.text for parts in sampled for part in parts)
        train_tokenizer(
            texts, size=size, context=CONTEXT_TOKENS, architecture=architecture
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(recipe: Recipe, *, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a model with random weights, in float32."""
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END)
    if recipe.architecture is Architecture.SEQ2SEQ:
        # Fields that the signature of the configuration lacks.
        further: dict[str, Any] = {"n_positions": CONTEXT_TOKENS, "decoder_start_token_id": pad}
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=recipe.hidden,
            d_kv=recipe.hidden // recipe.heads,
            d_ff=recipe.intermediate,
            num_layers=recipe.layers,
            num_heads=recipe.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            eos_token_id=end,
            pad_token_id=pad,
            **further,
        )
        return T5ForConditionalGeneration(config)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def train(
    name: str, recipe: Recipe, *, workspace: Workspace, loss: Loss = answer_loss
) -> PreTrainedModel:
    """Return the trained model, resuming from its checkpoint if there is one.

    Args:
        name: Of its files.
        recipe: Its shape and training.
        workspace: Tokenizer, folder, seed and device.
        loss: What is minimized.
    """
    torch.manual_seed(workspace.seed)
    model = new_model(recipe, tokenizer=workspace.tokenizer).train()
    torch.nn.Module.to(model, device=workspace.device)
    optimizers = _optimizers(model, rate=recipe.learning_rate)
    losses: list[float] = []  # of each step, in nats per answer token
    workspace.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = workspace.folder / f"{name}.checkpoint.pt"
    if checkpoint.exists():
        stored: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(stored["model"])
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        losses = stored["losses"]
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=recipe.steps, completed=len(losses), loss="")
        for step in range(len(losses), recipe.steps):
            # A short warm-up, then linear decay to zero.
            share = min((step + 1) / _WARM_UP_STEPS, (recipe.steps - step) / recipe.steps)
            for parameters in chain.from_iterable(one.param_groups for one in optimizers):
                parameters["lr"] = recipe.learning_rate * share
            groups = batches(workspace.tokenizer, recipe, seed=f"{workspace.seed}/{name}/{step}")
            losses.append(
                _step(model, optimizers, [group.to(workspace.device) for group in groups], loss)
            )
            progress.update(bar, advance=1, loss=f"{losses[-1]:.3f}")
            if len(losses) % CHECKPOINT_STEPS == 0:
                states = [optimizer.state_dict() for optimizer in optimizers]
                state = {"losses": losses, "model": model.state_dict(), "optimizers": states}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)  # atomically
                progress.console.log(f"{name} step {len(losses)} loss {losses[-1]:.3f}")
    rounded = [round(loss, 4) for loss in losses]
    (workspace.folder / f"{name}{_LOSSES_SUFFIX}").write_text(json.dumps(rounded))
    return model.eval()


def _optimizers(model: PreTrainedModel, *, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the hidden matrices and AdamW for everything else."""
    hidden = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    others = [weight for weight in model.parameters() if all(weight is not one for one in hidden)]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _step(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    groups: Sequence[Batch],
    loss: Loss,
) -> float:
    """Take one step on all groups together and return its loss per answer token."""
    tokens = sum(len(answer_labels(batch)) for batch in groups)
    total = 0.0
    for batch in groups:
        with _mixed_precision(batch.tokens_BT.device):
            part = loss(model, batch) / tokens
        part.backward()
        total += part.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _mixed_precision(device: torch.device) -> torch.autocast:
    """Return autocast to bfloat16, where the device has instructions for it."""
    slow = helps(torch.empty(0, device=device, dtype=torch.bfloat16))
    return torch.autocast(device.type, torch.bfloat16, enabled=not slow)


def save(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete Hugging Face folder with weights in bfloat16.

    Args:
        model: Converted in place.
        tokenizer: Written beside the weights.
        folder: Where to.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_curves(folder: Path) -> Path:
    """Plot the losses of every model in `folder`, smoothed over 25 steps; return the PNG.

    Raises:
        InvalidMeasurement: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, nats per answer token", yscale="log",
        title="Learning curves (the drafter's loss is half a divergence from the expert)",
    )  # fmt: skip
    for path in sorted(folder.glob(f"*{_LOSSES_SUFFIX}")):
        losses = np.array(json.loads(path.read_text()))
        [line] = axes.plot(losses, alpha=0.25, linewidth=0.6)
        smooth = np.convolve(losses, np.full(_SMOOTHED_STEPS, 1 / _SMOOTHED_STEPS), mode="valid")
        axes.plot(
            np.arange(len(smooth)) + _SMOOTHED_STEPS - 1, smooth,
            color=line.get_color(), label=path.name.removesuffix(_LOSSES_SUFFIX),
        )  # fmt: skip
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    return folder / "curves.png"


if __name__ == "__main__":
    sys.exit(typer.run(main))
