"""Runs a program that a model wrote in one restricted process, and judges it from another.

The *worker* runs the program and answers calls of its functions with plain data. The *judge*
evaluates the assertions with Python's own builtins and asks the worker for everything else. The
worker never sees an assertion or a verdict, so a program can only pass by returning right values,
even one that controls its whole process. Both processes are confined in the same way:

1. only a subset of Python runs: no imports, no names or attributes that lead to the interpreter;
2. resource limits: two seconds of CPU, 256 MiB, no new file, process or socket;
3. an empty root directory, no network, an unprivileged user, as far as the kernel allows it.

It is no virtual machine. This file is both the library and the program that the processes run: it
imports nothing of ours.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from io import BufferedRWPair

_LIMITS = {
    resource.RLIMIT_CPU: 2,  # seconds
    resource.RLIMIT_AS: 1 << 28,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 0,
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

# Class patterns of `match` read attributes by name.
_FORBIDDEN_NODES = (ast.Import, ast.ImportFrom, ast.MatchClass, ast.AsyncFunctionDef, ast.Await)

_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS = (list, tuple, set, frozenset)
_VIEWS = tuple(type(view) for view in ({}.keys(), {}.values(), {}.items()))
_LAZY = (*_VIEWS, range, Iterator)

_MAX_ITEMS = 10_000  # of a lazy value
_MAX_BYTES = 1 << 20  # of a message

# Flags of unshare(2): namespaces of users, network and interprocess communication.
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS of prctl(2)
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534

_TIMEOUT_S = 10.0  # wall time; a busy machine may take long to grant two seconds of CPU


def passes(program: str, assertions: Sequence[str]) -> bool:
    """Return whether `program` runs and all `assertions` hold.

    Arguments and results of the program's functions must be plain data: numbers, text, bytes, None,
    and lists, tuples, sets and dicts of those; a result may also be an iterator over such data.
    Names of builtins mean Python's own. An assertion that uses nothing of the program fails.

    Args:
        program: Python source.
        assertions: Python statements.
    """
    secret = secrets.token_hex()
    message = repr((secret, program, list(assertions)))
    command = [sys.executable, "-I", "-S", __file__]
    ours, theirs = socket.socketpair()
    channel = ours.fileno()
    with tempfile.TemporaryDirectory() as folder, ours, theirs:
        options: dict[str, Any] = {
            "cwd": folder,
            "env": {"PYTHONUTF8": "1"},
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
        }
        worker = subprocess.Popen(  # noqa: S603 - our own interpreter, isolated
            [*command, "worker"], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, **options
        )
        theirs.close()
        try:
            judge = subprocess.run(  # noqa: S603 - as above
                [*command, "judge", str(channel)],
                input=message.encode("utf-8", "backslashreplace"),
                stdout=subprocess.PIPE,
                pass_fds=(channel,),
                timeout=_TIMEOUT_S,
                check=False,
                **options,
            )
        except subprocess.TimeoutExpired:
            return False
        finally:
            worker.kill()
            worker.wait()
    return judge.stdout == f"{secret} {len(assertions)}".encode()


def is_harmless(tree: ast.AST) -> bool:
    """Return whether a program uses no name or syntax that leads out of the sandbox."""
    return not any(isinstance(node, _FORBIDDEN_NODES) or _escapes(node) for node in ast.walk(tree))


def _escapes(node: ast.AST) -> bool:
    match node:
        case ast.Constant():
            return False
        case ast.Attribute(attr=name):
            return name.startswith("_") or name in _ESCAPING_ATTRIBUTES
        case ast.FunctionDef(name="__init__"):
            return False
        case _:
            # Every other text in a node is a name that it reads, binds, declares or passes.
            return any(name.startswith("__") for name in _texts(node))


def _texts(node: ast.AST) -> Iterable[str]:
    for _, value in ast.iter_fields(node):
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                yield entry


def confine() -> None:
    """Give up files, network and privileges, as far as the kernel allows, and set the limits.

    The current directory becomes the root. Root needs no user namespace; others get one, which
    gives them the right to the rest.
    """
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # a system without these calls
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.unshare(_NEW_NETWORK | _NEW_IPC | (_NEW_USER if os.geteuid() else 0))
    identity = (_NOBODY, _NOBODY, _NOBODY)
    steps: list[tuple[Callable[..., object], Sequence[object]]] = [
        (os.chroot, (".",)), (os.setgroups, ([],)), (os.setresgid, identity),
        (os.setresuid, identity),
    ]  # fmt: skip
    for step, arguments in steps:
        with suppress(OSError):
            step(*arguments)
    with suppress(AttributeError):  # as above
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)())
    for limit, value in _LIMITS.items():
        resource.setrlimit(limit, (value, value))


def encode(value: Any) -> str:
    """Return plain data as a literal of its kind and value.

    Raises:
        TypeError: It is not plain data, or a lazy value is too long.
    """
    if isinstance(value, _LAZY):
        items = list(islice(value, _MAX_ITEMS + 1))
        if len(items) > _MAX_ITEMS:
            raise TypeError(f"more than {_MAX_ITEMS} items")
        return f"('iterator', {_literal(items)})"
    return f"('value', {_literal(value)})"


def _literal(value: Any) -> str:
    kind: Any = type(value)
    if kind is float:
        return repr(value).replace("inf", "1e999")
    if kind in _SCALARS:
        return repr(value)
    if kind is dict:
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if kind not in _CONTAINERS:
        raise TypeError(f"{kind.__name__} is not plain data")
    parts = "".join(f"{_literal(item)}, " for item in value)
    if kind is list:
        return f"[{parts}]"
    if kind is tuple:
        return f"({parts})"
    return f"{{{parts}}}" if parts else "set()"


class ProgramError(Exception):
    """The program ended, raised, or answered with something else than plain data."""


def work(channel: BufferedRWPair[Any, Any]) -> None:
    """Run the program that the judge sends, then answer its requests until it ends."""
    scope = run(ast.literal_eval(channel.readline().decode()))
    while line := channel.readline():
        name, *arguments = ast.literal_eval(line.decode())
        try:
            value = scope[name]
            if arguments:
                value = value(*arguments[0], **arguments[1])
            text = "('function', None)" if callable(value) else encode(value)
        except Exception:  # noqa: BLE001 - whatever it raises, the assertion has failed
            text = "('error', None)"
        channel.write(text.encode() + b"\n")
        channel.flush()


def run(program: str) -> dict[str, Any]:
    """Run a program and return its names.

    Raises:
        ProgramError: It uses what is not allowed.
        Exception: What the program raises.
    """
    tree = ast.parse(program)
    if not is_harmless(tree):
        raise ProgramError("it uses a name or syntax that is not allowed")
    scope: dict[str, Any] = {"__builtins__": allowed_builtins(), "__name__": "program"}
    exec(compile(tree, "program", "exec"), scope)  # noqa: S102 - what this process is for
    return scope


def allowed_builtins() -> dict[str, Any]:
    """Return the builtins of programs and assertions; `print` ignores its arguments."""
    allowed: dict[str, Any] = {name: getattr(builtins, name) for name in _BUILTINS}
    return allowed | {"print": _print_nothing}


def _print_nothing(*_: object, **__: object) -> None:
    """Ignore the text: standard output carries the answers."""


class Judge:
    """Evaluates assertions about the names of a program in another process."""

    def __init__(self, channel: BufferedRWPair[Any, Any]) -> None:
        """Judge the program at the other end of `channel`, in the worker."""
        self._channel = channel
        self._answers = 0  # of the program, so far

    def count_passed(self, program: str, assertions: Sequence[str]) -> int:
        """Return how many assertions hold before the first that fails.

        Args:
            program: Python source, which the worker runs.
            assertions: Python statements.
        """
        allowed = allowed_builtins()
        self._send(repr(program))
        for count, assertion in enumerate(assertions):
            tree, answers = ast.parse(assertion), self._answers
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            scope = {name: self._lookup(name) for name in names - allowed.keys() - _bound(tree)}
            try:
                exec(compile(tree, "assertion", "exec"), scope | {"__builtins__": allowed})  # noqa: S102 - what this process is for
            except Exception:  # noqa: BLE001 - whatever it raises, it does not hold
                return count
            if self._answers == answers:
                return count  # it says nothing about the program
        return len(assertions)

    def _lookup(self, name: str) -> Any:
        """Return a value of the program, or a function that calls one of its functions."""
        kind, value = self._ask(f"({name!r},)")
        return self._function(name) if kind == "function" else value

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object, **keywords: object) -> Any:
            request = f"({name!r}, {_literal(arguments)}, {_literal(keywords)})"
            return self._ask(request)[1]

        return call

    def _ask(self, request: str) -> tuple[str, Any]:
        self._send(request)
        line = self._channel.readline(_MAX_BYTES)
        if not line.endswith(b"\n"):
            raise ProgramError("it ended, or answered with more than is allowed")
        kind, value = ast.literal_eval(line.decode())
        if kind == "error":
            raise ProgramError("it raised, or did not return plain data")
        self._answers += 1
        return kind, iter(value) if kind == "iterator" else value

    def _send(self, request: str) -> None:
        self._channel.write(request.encode("utf-8", "backslashreplace") + b"\n")
        self._channel.flush()


def _bound(tree: ast.AST) -> set[str]:
    """Return the names that an assertion binds itself: arguments and loop variables."""
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return arguments | {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def main() -> None:
    """Be the worker, whose standard input is the channel, or the judge, who prints the verdict."""
    role, *arguments = sys.argv[1:]
    if role == "worker":
        channel = socket.socket(fileno=0).makefile("rwb")
        confine()
        work(channel)
        return
    secret, program, assertions = ast.literal_eval(sys.stdin.read())
    channel = socket.socket(fileno=int(arguments[0])).makefile("rwb")
    confine()
    count = 0
    with suppress(Exception):  # whatever goes wrong, the program has failed
        count = Judge(channel).count_passed(program, assertions)
    sys.stdout.write(f"{secret} {count}")


if __name__ == "__main__":
    main()
