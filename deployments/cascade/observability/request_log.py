"""One log line per answer: what it cost and how it ended, never its text."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from cascade.observability.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.observability.request_record import RequestRecord

FIELD = "answer"  # of the log record; Serve's JSON encoding writes it out
COUNTS = (
    *("cached_prompt_tokens", "drafter_tokens", "kept_tokens", "expert_tokens", "forced_tokens"),
    *("rounds", "drafted", "accepted", "judged", "deferred", "drafter_passes", "expert_passes"),
    *("sent_bytes", "received_bytes", "divergence", "unmeasured_tokens", "spent_budgets"),
)

logger = logging.getLogger("cascade.answers")


class RequestLog(Observer):
    """Writes a line when an answer ends."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def end(self, record: RequestRecord) -> None:
        """Write a sentence for people, and the figures beside it."""
        if not logger.isEnabledFor(logging.INFO):
            return
        statistics, fields = record.statistics, _fields(record, now_s=self._clock())
        logger.log(
            logging.INFO if record.error is None else logging.WARNING,
            "%s: %d tokens in %.3f s, %d rounds, %d of %d drafted accepted, %s",
            *(record.request.name, record.tokens, fields["seconds"], statistics.rounds),
            *(statistics.accepted, statistics.drafted, record.finish),
            extra={FIELD: fields},
        )


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON, for processes without Serve."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        if fields := getattr(record, FIELD, None):
            line[FIELD] = fields
        return json.dumps(line)


def to_serve() -> None:
    """Send this package's log where Serve sends its own: to its files, in its encoding."""
    ours, serves = logging.getLogger("cascade"), logging.getLogger("ray.serve")
    ours.setLevel(serves.level)
    ours.handlers = serves.handlers  # the list itself: Serve empties and refills it
    ours.propagate = False


def to_stderr() -> None:
    """Send this package's log to standard error as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    ours = logging.getLogger("cascade")
    ours.setLevel(logging.INFO)
    ours.handlers = [handler]
    ours.propagate = False


def _fields(record: RequestRecord, *, now_s: float) -> dict[str, Any]:
    statistics, request = record.statistics, record.request
    first_s = None if record.first_s is None else round(record.first_s - record.began_s, 6)
    return {
        "id": request.name,
        "caller": request.caller.name,
        "mode": request.mode.value,
        "rule": record.rule,
        "finish": record.finish,
        "error": None if record.error is None else type(record.error).__name__,
        "prompt_tokens": len(request.client_prompt),
        "tokens": record.tokens,
        **{name: getattr(statistics, name) for name in COUNTS},
        "seconds": round(now_s - record.began_s, 6),
        "first_token_s": first_s,
        "drafter_s": round(statistics.drafter_s, 6),
        "expert_s": round(statistics.expert_s, 6),
        "drafter_pass_s": round(statistics.drafter_pass_s, 6),
        "expert_pass_s": round(statistics.expert_pass_s, 6),
        "failovers": statistics.failover_causes,
        "undrafted_rounds": statistics.undrafted_rounds,
        "draft_lengths": statistics.draft_length_reasons,
    }
