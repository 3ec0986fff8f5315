"""Runs whose times are known, and settings under which a busy machine changes no result."""

from __future__ import annotations

from typing import Any

from tests.support.shipped_pair import ENGINE

from cascade.benchmark.load import LoadResult
from cascade.benchmark.metrics import summarize
from cascade.benchmark.runner import SystemResult
from cascade.benchmark.systems import Role
from cascade.errors import Unavailable
from cascade.evaluation.client import CompletionResult
from cascade.settings import Application

PATIENT = Application.model_validate(
    {
        "drafter": {"engine": ENGINE},
        "expert": {"engine": ENGINE},
        "router": {"draft_deadline_s": 120},
    }
)


def answer(**changes: Any) -> CompletionResult:
    """Return an answer of 11 tokens in 3 rounds: 0.2 s to the first text, 1.2 s in all."""
    plain: dict[str, Any] = {
        "text": "yes",
        "finish_reason": "stop",
        "statistics": {
            "rounds": 3,
            "drafted": 12,
            "accepted": 8,
            "expert_passes": 2,
            "drafter_s": 0.1,
            "expert_s": 0.9,
            "sent_bytes": 60,
            "received_bytes": 50,
            "draft_length_reason": "fixed",
        },
        "prompt_tokens": 5,
        "completion_tokens": 11,
        "latency_s": 1.2,
        "ttft_s": 0.2,
    }
    return CompletionResult(**(plain | changes))


def load_result(*answers: CompletionResult | None, wall_s: float = 2.0) -> LoadResult:
    """Return a run; None is a request that failed."""
    results = (one or Unavailable("no replica") for one in answers)
    return LoadResult(results=tuple(results), wall_s=wall_s)


def system_result(
    *walls_s: float, texts: tuple[str | None, ...] = ("a",), role: Role = Role.OTHER
) -> SystemResult:
    """Return a result of one answer per round, which took the given times."""
    rounds = (summarize(load_result(answer(), wall_s=wall_s)) for wall_s in walls_s)
    return SystemResult(rounds=tuple(rounds), texts=texts, role=role)
