"""Runs one program of a model against assertions; the child of `sandbox`, standard library alone.

Standard input is the literal of (mark, program, assertions); standard output is the mark and how
many assertions held, which a program that never sees the mark cannot fake.

What a program may do follows RestrictedPython's approach: no import, no name or attribute that
begins with an underscore, none that leads from a value to the interpreter, and builtins from a list
of plain ones. The kernel holds the rest: processor, memory, files, processes.
"""

from __future__ import annotations

import ast
import builtins
import resource
import sys
from contextlib import suppress
from typing import Any

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
