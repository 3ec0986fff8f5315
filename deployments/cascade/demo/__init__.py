"""The shipped pairs: complete Hugging Face folders. Importing this module imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The package is always unpacked on disk: a wheel is, and Ray ships folders.
_HERE = Path(str(files("cascade.demo")))

DRAFTER: Path = _HERE / "drafter"
EXPERT: Path = _HERE / "expert"

T5_DRAFTER: Path = _HERE / "t5" / "drafter"
T5_EXPERT: Path = _HERE / "t5" / "expert"

# By the names that the settings of a tier may give.
DRAFTERS: Mapping[str, Path] = MappingProxyType({"demo": DRAFTER, "demo-t5": T5_DRAFTER})
EXPERTS: Mapping[str, Path] = MappingProxyType({"demo": EXPERT, "demo-t5": T5_EXPERT})
