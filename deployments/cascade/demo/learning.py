"""One step of learning: the losses, the optimizers, and the state that a cut run goes on from.

`B` documents, `T` tokens of the longest, `N` tokens that are learned, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from cascade.demo.corpus import IGNORED, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM

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
