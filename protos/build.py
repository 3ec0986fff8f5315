"""Build hook that generates `cascade.v1` (messages, stubs and type stubs) from `protos/cascade/v1`.

Runs on `pip install .`, on `pip install -e .` and by hand as `poe protos`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTOS = Path(__file__).resolve().parent
TARGET = PROTOS.parent / "deployments"
PACKAGE = TARGET / "cascade" / "v1"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
OUTPUTS = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")


def generate() -> None:
    """Write the generated package.

    Raises:
        RuntimeError: protoc or one of its plugins is missing, or protoc rejects a file.
    """
    from grpc_tools import protoc  # noqa: PLC0415 - only the isolated build has it at import time

    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("cascade/v1/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    PACKAGE.mkdir(parents=True, exist_ok=True)
    code = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}"]
        + [f"--plugin={name}={_program(name)}" for name in PLUGINS]
        + [f"--{output}={TARGET}" for output in OUTPUTS]
        + files
    )
    if code != 0:
        raise RuntimeError(f"protoc ended with {code}; see its message above")
    _remove_stale({Path(file).stem for file in files})
    (PACKAGE / "__init__.py").write_text(
        '"""Generated from protos/cascade/v1; see its README."""\n'
    )


def _program(name: str) -> str:
    """Return the path of a protoc plugin, also if it is only beside the interpreter."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError(f"{name} is not installed; `pip install mypy-protobuf` installs it")
    return found


def _remove_stale(stems: set[str]) -> None:
    """Remove modules generated from .proto files that no longer exist."""
    for path in PACKAGE.glob("*_pb2*.py*"):
        if path.name.partition("_pb2")[0] not in stems:
            path.unlink()


class BuildHook(BuildHookInterface[Any]):
    """Generates the package before hatch collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate for every kind of build, editable ones too."""
        del version, build_data
        generate()


if __name__ == "__main__":
    generate()
    print(f"generated {PACKAGE}", file=sys.stderr)
