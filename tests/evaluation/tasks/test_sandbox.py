from __future__ import annotations

import ast

import pytest

from cascade.evaluation.tasks.sandbox import is_harmless, passes

HONEST = {
    "a method": "def f(x):\n    xs = []\n    xs.append(x)\n    return xs[0]",
    "a class": (
        "class A:\n    def __init__(self, x):\n        self.x = x\ndef f(x):\n    return A(x).x"
    ),
    "a loop": "def f(x):\n    while True:\n        return x",
    "printing": "def f(x):\n    print('working')\n    return x",
    "an error caught": (
        "def f(x):\n    try:\n        x // 0\n    except ZeroDivisionError:\n        return x"
    ),
}

ESCAPES = {
    "an import": "import os",
    "an import from": "from os import path",
    "the import function": "__import__('os')",
    "a file": "open('/etc/hostname')",
    "code": "exec('1')",
    "an attribute by name": "getattr((), '__class__')",
    "an attribute": "().__class__.__base__.__subclasses__()",
    "a pattern": "match ():\n    case object(__class__=kind):\n        pass",
    "a format": "'{0.__class__}'.format(())",
    "a frame": "g = (g.gi_frame for _ in [1])",
    "a traceback": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    e.__traceback__",
    "a type": "type('A', (), {})",
    "the builtins": "__builtins__['open']",
    "an answer equal to all": "class A:\n    def __eq__(self, _):\n        return True",
    "leaving": "raise SystemExit",
    "a breakpoint": "breakpoint()",
}


@pytest.mark.parametrize("program", HONEST.values(), ids=HONEST)
def test_an_honest_program_passes(program: str) -> None:
    assert passes(program, ["assert f(3) == 3"])


def test_every_assertion_must_hold() -> None:
    assert not passes("x = 1", ["assert x == 1", "assert x == 2"])


@pytest.mark.parametrize("program", ESCAPES.values(), ids=ESCAPES)
def test_an_escape_fails_even_if_the_assertions_would_hold(program: str) -> None:
    assert not passes(f"x = 1\n{program}", ["assert x == 1"])


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "x = 'x' * 10 ** 9",
        "def f():\n    f()\nf()",
        "x = " + "(" * 10_000,
        "x = " + "-" * 100_000 + "1",
        "x = '\ud800'",
        "x = '\0'",
        "x =",
    ],
)
def test_a_program_beyond_its_limits_fails(program: str) -> None:
    assert not passes(program, ["assert True"])


def test_a_result_cannot_be_printed() -> None:
    assert not passes("print(1)\nraise ValueError", ["assert True"])


def test_printed_output_is_discarded() -> None:
    assert passes("for _ in range(1000):\n    print('x' * 1000000)", ["assert True"])


@pytest.mark.parametrize("program", ["x.format()", "x._y", "__y", "async def f(): pass"])
def test_escapes_are_detected_before_the_program_runs(program: str) -> None:
    assert not is_harmless(ast.parse(program))


def test_plain_code_is_harmless() -> None:
    assert is_harmless(ast.parse("def f(xs):\n    return sorted(xs)[0].lower()"))
