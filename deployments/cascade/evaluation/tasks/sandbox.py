"""Whether a program of a model holds up to its assertions, found out in a process of its own."""

from __future__ import annotations

import ast
import builtins
import resource
import secrets
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMITS = {
    resource.RLIMIT_CPU: 2,  # seconds
    resource.RLIMIT_AS: 1 << 28,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 3,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}

PLAIN = (
    "abs", "all", "any", "ascii", "bin", "bool", "bytes", "callable", "chr", "complex", "dict",
    "divmod", "enumerate", "filter", "float", "frozenset", "hash", "hex", "id", "int",
    "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next", "object",
    "oct", "ord", "pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str",
    "sum", "tuple", "zip", "__build_class__", "ArithmeticError", "AssertionError",
    "AttributeError", "Exception", "IndexError", "KeyError", "LookupError", "NotImplementedError",
    "OverflowError", "RecursionError", "RuntimeError", "StopIteration", "TypeError", "ValueError",
    "ZeroDivisionError",
)  # fmt: skip

REACHING = (
    "format", "format_map", "mro", "with_traceback", "ag_await", "ag_code", "ag_frame",
    "cr_await", "cr_code", "cr_frame", "cr_origin", "gi_code", "gi_frame", "gi_yieldfrom",
    "f_back", "f_builtins", "f_code", "f_globals", "f_lasti", "f_locals", "f_trace", "tb_frame",
    "tb_next",
)  # fmt: skip

_REFUSED = (ast.Import, ast.ImportFrom, ast.MatchClass, ast.AsyncFunctionDef, ast.Await)


def harmless(tree: ast.AST) -> bool:
    """Say whether a program reaches into nothing. `match` would read attributes by their names."""
    return not any(isinstance(node, _REFUSED) or _reaches(node) for node in ast.walk(tree))


def _reaches(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr=name):
            return name.startswith("_") or name in REACHING
        case ast.Name(id=name):
            return name.startswith("__")
        case ast.FunctionDef(name=name):
            return name.startswith("__") and name != "__init__"  # `__eq__` could equal all
        case _:
            return False


def held(program: str, assertions: list[str]) -> int:
    """Return how many assertions hold before the first that does not."""
    tree = ast.parse(program)
    if not harmless(tree):
        return 0
    plain: dict[str, Any] = {name: getattr(builtins, name) for name in PLAIN}
    plain["print"] = _silent
    scope: dict[str, Any] = {"__builtins__": plain, "__name__": "program"}
    exec(compile(tree, "program", "exec"), scope)  # noqa: S102 - what this process is for
    count = 0
    for line in assertions:
        exec(line, dict(scope))  # noqa: S102 - as above
        count += 1
    return count


def _silent(*_: object, **__: object) -> None:
    """Print nothing: standard output is for the result."""


def main() -> None:
    """Read, limit, run, tell."""
    mark, program, assertions = ast.literal_eval(sys.stdin.read())
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))
    count = 0
    with suppress(Exception):  # whatever a program raises, it has failed
        count = held(program, assertions)
    sys.stdout.write(f"{mark} {count}")


if __name__ == "__main__":
    main()

_TIMEOUT_S = 10.0  # of the clock; a busy machine may give two seconds of processor late


def passed(program: str, assertions: Sequence[str]) -> float:
    """Return 1 if `program` runs and all `assertions` hold, else 0.

    Both run in an isolated interpreter with an empty environment and folder, under the limits of
    `jail`: two seconds of processor, 256 MiB, no files, no processes, no imports, plain builtins.
    It withstands the ways out of Python that are known to us; it is no virtual machine.
    """
    mark = secrets.token_hex()
    told = repr((mark, program, list(assertions)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter, isolated
                [sys.executable, "-I", "-S", __file__],
                input=told.encode("utf-8", "backslashreplace"), cwd=folder,
                env={"PYTHONUTF8": "1"}, capture_output=True, timeout=_TIMEOUT_S, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 0.0
    return float(done.stdout == f"{mark} {len(assertions)}".encode())
