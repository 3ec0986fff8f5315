"""The pair that ships: where it lies, what it was trained on, and how.

Importing this package imports no torch.
"""

from cascade.demo.pair import DRAFTER, EXPERT

__all__ = ["DRAFTER", "EXPERT"]
