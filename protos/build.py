"""Build hook: generates `cascade.v1` (messages, stubs and their types) from `protos/cascade/v1`.

Runs on `pip install .`, on `pip install -e .` and by hand as `poe protos`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTOS = Path(__file__).resolve().parent
TARGET = PROTOS.parent / "deployments"


def generate() -> None:
    """Write the generated package; raises RuntimeError when protoc refuses a file."""
    from grpc_tools import protoc  # noqa: PLC0415 - only the isolated build has it at import time

    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("cascade/v1/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    outputs = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    package = TARGET / "cascade" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    code = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}", *(f"--{out}={TARGET}" for out in outputs)]
        + files
    )
    if code != 0:
        raise RuntimeError(f"protoc ended with {code}; its message stands above")
    (package / "__init__.py").write_text('"""Generated from protos/cascade/v1; see protos/README.md."""\n')


class BuildHook(BuildHookInterface[Any]):
    """Generates the package before hatch collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate for every kind of build, editable ones too."""
        del version, build_data
        generate()


if __name__ == "__main__":
    generate()
    print(f"generated {TARGET / 'cascade' / 'v1'}", file=sys.stderr)
