"""Finds grammars that no answer can ever match, because each would go on without end.

`{"properties": {"next": {"$ref": "#"}}, "required": ["next"]}` is one.
"""

from __future__ import annotations

import re

# The parts of a rule as xgrammar prints it: texts and classes of characters are always finite.
_PARTS = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]\*?|(?P<ref>[A-Za-z_][\w.-]*)(?:\{(?P<least>\d+),[^}]*\})?'
    r"|(?P<paren>\(=|[()])|(?P<bar>\|)"
)


def is_endless(printed: str, *, root: str = "root") -> bool:
    """Return whether no finite text matches a grammar.

    Args:
        printed: The grammar as xgrammar prints it.
        root: The rule that is the whole answer.
    """
    rules = dict(line.split(" ::= ", 1) for line in printed.splitlines() if " ::= " in line)
    needs = {name: _alternatives(body, rules) for name, body in rules.items()}
    ends: set[str] = set()
    while found := {
        name
        for name, alternatives in needs.items()
        if name not in ends and any(needed <= ends for needed in alternatives)
    }:
        ends |= found
    return root in rules and root not in ends


def _alternatives(body: str, rules: dict[str, str]) -> list[set[str]]:
    """Return which rules each alternative of a rule needs."""
    alternatives, ahead = [set[str]()], 0
    depth = 0
    for part in _PARTS.finditer(body):
        paren = part["paren"]
        if paren == ")":
            depth -= 1
            ahead = 0 if depth < ahead else ahead
        elif paren:
            depth += 1
            ahead = ahead or (depth if paren == "(=" else 0)
        elif ahead:  # what must follow is no part of the text
            continue
        elif part["bar"]:
            alternatives.append(set())
        elif part["ref"] in rules and part["least"] != "0":
            alternatives[-1].add(part["ref"])
    return alternatives
