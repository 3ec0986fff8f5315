"""Runs a program that a model wrote, and its assertions, in a restricted process of its own.

This file is both the library and the program that the process runs: it imports nothing of ours.
"""

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

_LIMITS = {
    resource.RLIMIT_CPU: 2,  # seconds
    resource.RLIMIT_AS: 1 << 28,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 3,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}

_BUILTINS = (
    "abs", "all", "any", "ascii", "bin", "bool", "bytes", "callable", "chr", "complex", "dict",
    "divmod", "enumerate", "filter", "float", "frozenset", "hash", "hex", "id", "int",
    "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next", "object",
    "oct", "ord", "pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str",
    "sum", "tuple", "zip", "__build_class__", "ArithmeticError", "AssertionError",
    "AttributeError", "Exception", "IndexError", "KeyError", "LookupError", "NotImplementedError",
    "OverflowError", "RecursionError", "RuntimeError", "StopIteration", "TypeError", "ValueError",
    "ZeroDivisionError",
)  # fmt: skip

_ESCAPING_ATTRIBUTES = (
    "format", "format_map", "mro", "with_traceback", "ag_await", "ag_code", "ag_frame",
    "cr_await", "cr_code", "cr_frame", "cr_origin", "gi_code", "gi_frame", "gi_yieldfrom",
    "f_back", "f_builtins", "f_code", "f_globals", "f_lasti", "f_locals", "f_trace", "tb_frame",
    "tb_next",
)  # fmt: skip

_FORBIDDEN_NODES = (ast.Import, ast.ImportFrom, ast.MatchClass, ast.AsyncFunctionDef, ast.Await)


def is_harmless(tree: ast.AST) -> bool:
    """Return whether a program uses no name or syntax that leads out of the sandbox."""
    # Class patterns of `match` are forbidden too: they read attributes by name.
    return not any(isinstance(node, _FORBIDDEN_NODES) or _escapes(node) for node in ast.walk(tree))


def _escapes(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr=name):
            return name.startswith("_") or name in _ESCAPING_ATTRIBUTES
        case ast.Name(id=name):
            return name.startswith("__")
        case ast.FunctionDef(name=name):
            # An `__eq__` could make an answer equal to everything.
            return name.startswith("__") and name != "__init__"
        case _:
            return False


def count_passed(program: str, assertions: list[str]) -> int:
    """Return how many assertions hold before the first that fails."""
    tree = ast.parse(program)
    if not is_harmless(tree):
        return 0
    allowed: dict[str, Any] = {name: getattr(builtins, name) for name in _BUILTINS}
    allowed["print"] = _print_nothing
    scope: dict[str, Any] = {"__builtins__": allowed, "__name__": "program"}
    exec(compile(tree, "program", "exec"), scope)  # noqa: S102 - what this process is for
    count = 0
    for assertion in assertions:
        exec(assertion, dict(scope))  # noqa: S102 - as above
        count += 1
    return count


def _print_nothing(*_: object, **__: object) -> None:
    """Ignore the text: standard output carries the result."""


def main() -> None:
    """Read a program from standard input, run it under limits and print how many tests passed."""
    secret, program, assertions = ast.literal_eval(sys.stdin.read())
    for limit, value in _LIMITS.items():
        resource.setrlimit(limit, (value, value))
    count = 0
    with suppress(Exception):  # whatever a program raises, it has failed
        count = count_passed(program, assertions)
    sys.stdout.write(f"{secret} {count}")


_TIMEOUT_S = 10.0  # wall time; a busy machine may take long to grant two seconds of CPU


def passes(program: str, assertions: Sequence[str]) -> bool:
    """Return whether `program` runs and all `assertions` hold.

    Both run in an isolated interpreter with an empty environment and folder: two seconds of CPU,
    256 MiB, no files, no processes, no imports, few builtins. This stops the known ways out of
    Python; it is no virtual machine.
    """
    secret = secrets.token_hex()
    message = repr((secret, program, list(assertions)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(  # noqa: S603 - our own interpreter, isolated
                [sys.executable, "-I", "-S", __file__],
                input=message.encode("utf-8", "backslashreplace"), cwd=folder,
                env={"PYTHONUTF8": "1"}, capture_output=True, timeout=_TIMEOUT_S, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return process.stdout == f"{secret} {len(assertions)}".encode()


if __name__ == "__main__":
    main()
