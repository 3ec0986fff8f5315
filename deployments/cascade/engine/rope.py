"""RoPE whose frequencies follow the longest position of a pass.

Dynamic NTK and LongRoPE pick frequencies from the largest position in the batch, so a short
session beside a long one would be computed wrongly. Sessions are therefore told apart by their
*regime*: the length that frequencies are computed for, 0 for the usual ones. Passes never mix
regimes, rows of one regime are dropped in another, and a pass whose own positions end too early
carries ballast: one token, alone in a scratch extent, at the last position of the regime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CACHED_LENGTH = "max_seq_len_cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeLengths:
    """Which lengths share their frequencies."""

    original: int = 0  # tokens up to which the usual frequencies hold; 0: always
    dynamic: bool = False  # beyond it, every length has its own

    def of(self, length: int) -> int:
        """Return the regime of a session of `length` tokens."""
        if not self.original or length <= self.original:
            return 0
        return length if self.dynamic else self.original + 1


def find(model: torch.nn.Module) -> RopeLengths:
    """Return the regimes of `model`, read from its rotary modules."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", "")
        names = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if any("dynamic" in str(name) for name in names):
            return RopeLengths(original=int(_original(module)), dynamic=True)
        if "longrope" in names:
            return RopeLengths(original=int(_original(module)))
    return RopeLengths()


def forget(model: torch.nn.Module) -> None:
    """Make dynamic RoPE modules compute their frequencies anew, whatever lengths they have seen."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith(_CACHED_LENGTH)]:
            setattr(module, name, 0)


def _original(module: Any) -> int:
    parameters: Any = getattr(module.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for candidate in (parameters, *nested):
        if "original_max_position_embeddings" in candidate:
            return candidate["original_max_position_embeddings"]
    return module.original_max_seq_len
