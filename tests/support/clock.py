"""A clock that a test sets."""

from __future__ import annotations


class FakeClock:
    """Returns `now_s`, which only the test changes."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
