"""From an answer to a number in [0, 1]. Python answers run in a subprocess with limits."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, assert_never

from cascade.demo.tasks.item import Item, Scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

_REFUSED = frozenset({"open", "exec", "eval", "compile", "input", "globals", "getattr", "vars"})
_ARTICLES = frozenset({"a", "an", "the"})
_RUN_TIMEOUT_S = 5.0
# Limits are set by the child itself, since a preexec_fn is unsafe beside threads.
_HARNESS = """
import resource
for limit, value in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 1 << 28),
                     (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3)):
    resource.setrlimit(limit, (value, value))
del resource
scope = {}
passed = 0
try:
    exec(PROGRAM, scope)
    for line in ASSERTIONS:
        exec(line, dict(scope))
        passed += 1
except Exception:
    pass
print(passed)
"""


def score(item: Item, answer: str) -> float:
    """Return how right `answer` is: 1 for `item.short` and for `item.formal`."""
    match item.scorer:
        case Scorer.NUMBER:
            return float(last_number(answer) == item.references[0])
        case Scorer.MATCH:
            return float(any(words(answer) == words(right) for right in item.references))
        case Scorer.BIGRAMS:
            return max(rouge_2(answer, right) for right in item.references)
        case Scorer.PROGRAM:
            return passed(answer, item.references)
        case _:
            assert_never(item.scorer)


def last_number(text: str) -> str | None:
    """Return the last integer of `text`, as written, or None."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def words(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, no punctuation, no articles."""
    bare = re.sub(r"[^\w\s]", "", text.lower())
    return [word for word in bare.split() if word not in _ARTICLES]


def rouge_2(answer: str, reference: str) -> float:
    """Return the F1 of shared word pairs (Lin, 2004), as in XSum's ROUGE-2."""
    got, wanted = _bigrams(answer), _bigrams(reference)
    shared = (got & wanted).total()
    return 2 * shared / (got.total() + wanted.total()) if shared else 0.0


def passed(program: str, assertions: Sequence[str]) -> float:
    """Return 1 if `program` runs and all `assertions` hold, else 0.

    The program runs in its own isolated interpreter: two seconds of processor, 256 MiB, no open
    files, no imports, no attributes. That stops the accidents of a small model, not an attacker.
    """
    if not _harmless(program):
        return 0.0
    source = f"PROGRAM = {program!r}\nASSERTIONS = {list(assertions)!r}\n{_HARNESS}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter, isolated
                [sys.executable, "-I", "-S", "-c", source],
                cwd=folder, env={}, capture_output=True, timeout=_RUN_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 0.0
    return float(done.stdout.strip() == str(len(assertions)).encode())


def _harmless(program: str) -> bool:
    """Say whether `program` parses and neither imports, opens nor reaches into anything."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError):
        return False
    return not any(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)
        or (isinstance(node, ast.Name) and (node.id in _REFUSED or node.id.startswith("__")))
        for node in ast.walk(tree)
    )


def _bigrams(text: str) -> Counter[tuple[str, str]]:
    tokens = re.findall(r"\w+", text.lower())
    return Counter(pairwise(tokens))
