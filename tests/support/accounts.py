"""What must agree in the accounts of an answer, whatever its mode, rule, faults and end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cascade.types import Mode, Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.types import Request, Statistics


def check_accounts(request: Request, statistics: Statistics, origins: Sequence[Origin]) -> None:
    """Check the statistics of an answer, or of its beginning.

    Args:
        request: What was asked for, with a trace.
        statistics: Its accounts.
        origins: Of the tokens that were received.
    """
    count, lengths = Counter(origins), statistics.accepted_lengths
    assert statistics.drafter_tokens == count[Origin.DRAFTER]
    assert statistics.kept_tokens == count[Origin.KEPT]
    assert statistics.expert_tokens == count[Origin.EXPERT]
    assert statistics.accepted == statistics.drafter_tokens + statistics.kept_tokens
    assert statistics.accepted == sum(at * rounds for at, rounds in enumerate(lengths))
    assert statistics.deferred <= statistics.judged <= statistics.drafted
    assert len(lengths) - 1 <= statistics.drafted
    assert statistics.predicted_accepted <= statistics.accepted
    if request.mode is not Mode.DRAFTER_ONLY and not statistics.expert_losses:
        assert statistics.accepted <= statistics.judged
    _check_rounds(request, statistics)


def _check_rounds(request: Request, statistics: Statistics) -> None:
    trace, lengths = statistics.trace, statistics.accepted_lengths
    assert len(trace) == statistics.rounds == sum(statistics.draft_length_reasons.values())
    for name in ("drafted", "accepted", "deferred"):
        assert sum(getattr(one, name) for one in trace) == getattr(statistics, name), name
    assert sum(one.tokens for one in trace) == statistics.accepted + statistics.expert_tokens
    found = Counter(one.accepted for one in trace if one.drafted)
    assert {at: rounds for at, rounds in enumerate(lengths) if rounds} == found
    assert Counter(one.undrafted for one in trace if one.undrafted) == statistics.undrafted_rounds
    for one in trace:
        assert max(one.accepted, one.deferred) <= one.drafted
        assert one.accepted <= one.tokens
        assert not (one.undrafted and one.drafted)
    thrown_away = request.mode is Mode.SEQUENCE_CASCADE and statistics.deferred
    if thrown_away:
        assert statistics.accepted == 0 or statistics.expert_losses
