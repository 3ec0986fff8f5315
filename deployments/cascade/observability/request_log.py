"""One line in the log for each answer: what it cost and how it ended, never what it said."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.observability.observer import RequestRecord

FIELD = "answer"  # of the record: Serve's JSON encoding writes it out

logger = logging.getLogger("cascade.answers")


class RequestLog:
    """An observer that writes a line when an answer ends."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def begin(self, account: RequestRecord) -> None:
        """Write nothing yet."""

    def progress(self, account: RequestRecord) -> None:
        """Write nothing yet."""

    def end(self, account: RequestRecord) -> None:
        """Write the line: a sentence for people, and the figures beside it."""
        if not logger.isEnabledFor(logging.INFO):
            return
        entry, figures = account.statistics, _figures(account, now_s=self._clock())
        logger.log(
            logging.INFO if account.error is None else logging.WARNING,
            "%s: %d tokens in %.3f s, %d rounds, %d of %d drafted accepted, %s",
            *(account.request.name, account.tokens, figures["seconds"], entry.rounds),
            *(entry.accepted, entry.drafted, account.finish),
            extra={FIELD: figures},
        )


class JsonLines(logging.Formatter):
    """A record as one line of JSON, for processes without Serve, which has its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        if figures := getattr(record, FIELD, None):
            line[FIELD] = figures
        return json.dumps(line)


def to_serve() -> None:
    """Send this package's records where Serve sends its own: to its files, in its encoding."""
    ours, serves = logging.getLogger("cascade"), logging.getLogger("ray.serve")
    ours.setLevel(serves.level)
    ours.handlers = serves.handlers  # the list itself: Serve empties and fills it again
    ours.propagate = False


def to_stderr() -> None:
    """Send this package's records to standard error as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    ours = logging.getLogger("cascade")
    ours.setLevel(logging.INFO)
    ours.handlers = [handler]
    ours.propagate = False


def _figures(account: RequestRecord, *, now_s: float) -> dict[str, Any]:
    entry, request = account.statistics, account.request
    first_s = None if account.first_s is None else round(account.first_s - account.began_s, 6)
    return {
        "id": request.name,
        "mode": request.mode.value,
        "rule": account.rule,
        "finish": account.finish,
        "error": None if account.error is None else type(account.error).__name__,
        "prompt_tokens": len(request.prompt),
        "cached_prompt_tokens": entry.cached_prompt_tokens,
        "tokens": account.tokens,
        "drafter_tokens": entry.drafter_tokens,
        "kept_tokens": entry.kept_tokens,
        "expert_tokens": entry.expert_tokens,
        "rounds": entry.rounds,
        "drafted": entry.drafted,
        "accepted": entry.accepted,
        "judged": entry.judged,
        "deferred": entry.deferred,
        "drafter_passes": entry.drafter_passes,
        "expert_passes": entry.expert_passes,
        "seconds": round(now_s - account.began_s, 6),
        "first_token_s": first_s,
        "drafter_s": round(entry.drafter_s, 6),
        "expert_s": round(entry.expert_s, 6),
        "sent_bytes": entry.sent_bytes,
        "received_bytes": entry.received_bytes,
        "failovers": entry.failover_causes,
        "draft_lengths": account.reasons,
    }
