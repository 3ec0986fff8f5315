"""Learning curves: the loss of every step as JSON, and a plot of what lies in a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "learning curves are drawn with matplotlib; pip install 'speculative-cascades[lab]'"
    ) from error

_SUFFIX = ".losses.json"

_SMOOTHED_STEPS = 25


def write_losses(folder: Path, *, name: str, losses: Sequence[float]) -> None:
    """Write the loss of each step of the model `name`, in nats per answer token."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}{_SUFFIX}").write_text(json.dumps([round(loss, 4) for loss in losses]))


def draw_curves(folder: Path) -> Path:
    """Draw every model's losses in `folder`, smoothed over 25 steps, and return the PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, nats per answer token", yscale="log",
        title="Learning curves (the drafter's loss is half a divergence from the expert)",
    )  # fmt: skip
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        losses = np.array(json.loads(path.read_text()))
        [line] = axes.plot(losses, alpha=0.25, linewidth=0.6)
        smooth = np.convolve(losses, np.full(_SMOOTHED_STEPS, 1 / _SMOOTHED_STEPS), mode="valid")
        axes.plot(
            np.arange(len(smooth)) + _SMOOTHED_STEPS - 1, smooth,
            color=line.get_color(), label=path.name.removesuffix(_SUFFIX),
        )  # fmt: skip
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    return folder / "curves.png"
