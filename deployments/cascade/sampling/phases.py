"""The phases of an answer: thoughts, text, tool calls; each may have a rule of its own.

A phase is a function of the tokens before a position, so drafter, expert and a replica that takes a
session over agree on it. A block is drafted and judged under one rule: it ends where a phase does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cascade.types import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascade.rules import Rule
    from cascade.types import DecodingParams, PhaseRules

_WORD = 32


class PhaseTracker:
    """Finds the phase at any position of one session's answer.

    Tokens are read once: it goes back where they differ from those that it saw last.
    """

    def __init__(self, phases: PhaseRules) -> None:
        self._phases = phases
        self._seen: list[int] = []
        self._at = [phases.start]  # the phase of the token at each position
        self._began = [0]  # where that phase began
        self._thoughts = [0]  # tokens of thoughts before each position

    def phase(self, tokens: Sequence[int]) -> Phase:
        """Return the phase of the token that follows these."""
        self.read(tokens)
        return self.phase_at(len(tokens))

    def phase_at(self, position: int) -> Phase:
        """Return the phase of the token at a position, of those read or the next."""
        return self._at[position]

    def thoughts(self, position: int) -> tuple[int, list[int]]:
        """Return how many tokens before a position are thoughts, and those of its phase so far."""
        return self._thoughts[position], self._seen[self._began[position] : position]

    def read(self, tokens: Sequence[int]) -> None:
        """Find the phase at each of these tokens and after them."""
        tokens = list(tokens)
        if self._seen[: len(tokens)] == tokens:
            return
        pairs = enumerate(zip(self._seen, tokens, strict=False))
        known = len(self._seen)
        if tokens[:known] != self._seen:
            known = next((at for at, (old, new) in pairs if old != new), len(tokens))
        del self._seen[known:], self._at[known + 1 :]
        del self._began[known + 1 :], self._thoughts[known + 1 :]
        for token in tokens[known:]:
            self._add(token)

    def _add(self, token: int) -> None:
        phase, began = self._at[-1], self._began[-1]
        self._seen.append(token)
        for switch in self._phases.switches:
            start = len(self._seen) - len(switch.tokens)
            if (
                switch.phase is phase
                and start >= began
                and self._seen[start:] == list(switch.tokens)
            ):
                self._at.append(switch.next)
                self._began.append(len(self._seen))
                break
        else:
            self._at.append(phase)
            self._began.append(began)
        self._thoughts.append(self._thoughts[-1] + (phase is Phase.THINKING))


class SessionRules:
    """The parameters of each position of one session."""

    def __init__(self, policy: DecodingParams) -> None:
        self._policy = policy
        self._tracker: PhaseTracker | None = None
        if policy.phases is not None and policy.has_phase_rules:
            self._tracker = PhaseTracker(policy.phases)

    @property
    def vary(self) -> bool:
        """Whether positions differ."""
        return self._tracker is not None

    def at(self, tokens: Sequence[int]) -> DecodingParams:
        """Return the session's parameters with the rule of the token that follows these."""
        if self._tracker is None:
            return self._policy
        return _with_rule(self._policy, self._tracker.phase(tokens))

    def length(self, tokens: Sequence[int], drafted: Sequence[int]) -> int:
        """Return how many drafted tokens have the rule of the first.

        Args:
            tokens: Of the answer so far.
            drafted: Tokens after them.
        """
        if self._tracker is None:
            return len(drafted)
        self._tracker.read([*tokens, *drafted])
        rules = [
            _with_rule(self._policy, self._tracker.phase_at(len(tokens) + length)).rule
            for length in range(len(drafted))
        ]
        for length, rule in enumerate(rules):
            if rule != rules[0]:
                return length
        return len(drafted)


@lru_cache(maxsize=4096)
def _with_rule(policy: DecodingParams, phase: Phase) -> DecodingParams:
    assert policy.phases is not None, "asked where there are phases"
    rules: dict[Phase, Rule] = dict(policy.phases.rules)
    return replace(policy, rule=rules.get(phase, policy.rule))


class ThinkingBudget:
    """The mask of a thinking budget: once it is spent, only the end of thoughts may follow."""

    def __init__(self, phases: PhaseRules) -> None:
        assert phases.thinking_tokens is not None, "there is a budget"
        self._budget = phases.thinking_tokens
        self._tracker = PhaseTracker(phases)
        self._end = next(s.tokens for s in phases.switches if s.phase is Phase.THINKING)

    def restrict(
        self, bits_RW: NDArray[np.uint32], answer: Sequence[int], drafted: Sequence[int]
    ) -> bool:
        """Clear the bits of tokens that may not follow; return whether any row is restricted."""
        restricted = False
        self._tracker.read([*answer, *drafted[: len(bits_RW) - 1]])
        for row in range(len(bits_RW)):
            position = len(answer) + row
            if self._tracker.phase_at(position) is not Phase.THINKING:
                continue
            used, thoughts = self._tracker.thoughts(position)
            if used < self._budget:
                continue
            token = self._end[self._written(thoughts)]
            allowed = bits_RW[row, token // _WORD] & np.uint32(1 << token % _WORD)
            bits_RW[row] = 0
            bits_RW[row, token // _WORD] = allowed
            restricted = True
        return restricted

    def _written(self, thoughts: Sequence[int]) -> int:
        """Return how many tokens of the end are written already."""
        most = min(len(self._end) - 1, len(thoughts))
        written = (n for n in range(most, 0, -1) if tuple(thoughts[-n:]) == self._end[:n])
        return next(written, 0)
