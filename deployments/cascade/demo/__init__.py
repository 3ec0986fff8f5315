"""The shipped pair: two complete Hugging Face folders. Importing this module imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# The package is always unpacked on disk: a wheel is, and Ray ships folders.
_HERE = Path(str(files("cascade.demo")))

DRAFTER: Path = _HERE / "drafter"
EXPERT: Path = _HERE / "expert"
