"""Where the time of a round goes: one answer over both tiers in this process, instrumented.

The server has no hooks for this: a `Recorder` replaces a few methods by ones that also record when
they were called. Everything runs in one process, so there is one clock; messages still cross gRPC
on loopback.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.resources import files
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.report import heading
from cascade.benchmark.systems import tiers_of
from cascade.errors import InvalidMeasurement
from cascade.evaluation.scoring import import_extra
from cascade.local import local_server
from cascade.protocol.client import SessionStream
from cascade.protocol.messages import Judge, Judgement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from cascade.evaluation.environment import Provenance
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

# The stages of a round: the label and the color of each in the picture.
_STAGES = {
    "draft": ("router waits for a block", "#b0b7bf"),
    "send": ("block to the expert", "#8fb7d3"),
    "queue": ("expert's queue", "#b0b7bf"),
    "pass": ("expert's pass", "#2f6f9f"),
    "return": ("verdict to the router", "#8fb7d3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The rounds of one answer, and the drafter's forward passes meanwhile.

    A round is the start of each stage and the end of the last, a pass its start and end, in seconds
    of this process's clock.
    """

    rounds: tuple[tuple[float, ...], ...]
    drafter_passes: tuple[tuple[float, float], ...]
    statistics: Json

    def stages_ms(self) -> dict[str, float]:
        """Return the median duration of each stage over rounds."""
        stages = zip(*map(pairwise, self.rounds), strict=True)
        return {
            name: median(1e3 * (end - start) for start, end in spans)
            for name, spans in zip(_STAGES, stages, strict=True)
        }


class Recorder(ExitStack):
    """Records when methods are called, until it is closed: the times of each event, in order.

    A block is `sent` and `received`, a verdict `delivered`; a pass of a tier has `drafter began`,
    `drafter ended`, `expert began` and `expert ended`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times_s: defaultdict[str, list[float]] = defaultdict(list)

    def watch(
        self, owner: Any, method: str, *, before: str = "", after: str = "", only: type = object
    ) -> None:
        """Replace a method by one that records its calls.

        Args:
            owner: The object or the class that has the method.
            method: Its name.
            before: The event to record before a call, if any.
            after: The event to record after a call, if any.
            only: Record only calls with an argument of this type.
        """
        original: Callable[..., Any] = getattr(owner, method)

        @wraps(original)
        def recorded(*args: Any) -> Any:
            recording = any(isinstance(argument, only) for argument in args)
            if recording and before:
                self.times_s[before].append(time.perf_counter())
            result = original(*args)
            if recording and after:
                self.times_s[after].append(time.perf_counter())
            return result

        setattr(owner, method, recorded)
        self.callback(setattr, owner, method, original)


async def record(settings: Application, body: Json, *, rtt_ms: float = 0.0) -> Timeline:
    """Answer a request twice and return the timeline of the second answer.

    Args:
        settings: What `cascade.app:build` takes.
        body: The request.
        rtt_ms: Round trip to emulate.

    Raises:
        InvalidMeasurement: The answer had fewer than three rounds.
        StartupError: The pair cannot be served.
    """
    async with local_server(settings) as server:
        with Recorder() as recorder:
            recorder.watch(SessionStream, "send", before="sent", only=Judge)
            recorder.watch(SessionStream, "deliver", before="delivered", only=Judgement)
            for tier, replica in (("drafter", server.drafter), ("expert", server.expert)):
                recorder.watch(replica.engine.runner, "forward", before=f"{tier} began")
                recorder.watch(replica, "finish", after=f"{tier} ended")
                recorder.watch(replica, "receive", before="received", only=Judge)
            async with tiers_of(settings, server).routed("recorded", (rtt_ms,)) as (system,):
                await system.client.complete(body)
                recorder.times_s.clear()
                answer = await system.client.complete(body)
    return timeline_of(recorder.times_s, statistics=answer.statistics)


def timeline_of(times_s: Mapping[str, Sequence[float]], *, statistics: Json) -> Timeline:
    """Return the timeline of recorded events.

    The first round is left out: no verdict before it says when it began.

    Args:
        times_s: The times of each event of a `Recorder`.
        statistics: Of the answer.

    Raises:
        InvalidMeasurement: There are fewer than two rounds.
    """

    def first(event: str, since_s: float) -> float:
        return next((at_s for at_s in times_s.get(event, ()) if at_s >= since_s), math.inf)

    rounds: list[tuple[float, ...]] = []
    for sent_s in times_s["sent"]:
        before = [at_s for at_s in times_s["delivered"] if at_s <= sent_s]
        received_s = first("received", sent_s)
        pass_s = first("expert began", received_s)
        delivered_s = first("delivered", pass_s)
        if before and delivered_s < math.inf:
            # The verdict leaves before the logits handler returns: it may be delivered before that.
            judged_s = min(first("expert ended", pass_s), delivered_s)
            rounds.append((before[-1], sent_s, received_s, pass_s, judged_s, delivered_s))
    if len(rounds) < 2:  # noqa: PLR2004 - a rhythm needs two
        raise InvalidMeasurement(
            f"the answer took {statistics.get('rounds')} rounds, too few to show a rhythm; ask for"
            " fewer drafted tokens or for a longer answer"
        )
    passes = [(began, first("drafter ended", began)) for began in times_s.get("drafter began", ())]
    return Timeline(
        rounds=tuple(rounds),
        drafter_passes=tuple(one for one in passes if one[1] < math.inf),
        statistics=statistics,
    )


def picture(timeline: Timeline, path: Path, *, rounds: int = 4) -> None:
    """Draw the first rounds of a timeline: one lane per stage, time to the right.

    Args:
        timeline: What was recorded.
        path: Of the image.
        rounds: How many to draw.
    """
    import_extra("matplotlib").use("agg")
    pyplot = import_extra("matplotlib.pyplot")
    shown = timeline.rounds[:rounds]
    zero_s, end_s = shown[0][0], shown[-1][-1]
    stages = zip(*map(pairwise, shown), strict=True)
    lanes = [
        ("drafter's passes", "#d9822b", timeline.drafter_passes),
        *((*style, spans) for style, spans in zip(_STAGES.values(), stages, strict=True)),
    ]
    figure, axes = pyplot.subplots(figsize=(11, 3.4), layout="constrained")
    for lane, (_, color, spans) in enumerate(lanes):
        bars = [
            (1e3 * (start - zero_s), 1e3 * (end - start))
            for start, end in spans
            if start < end_s and end > zero_s
        ]
        axes.broken_barh(bars, (lane - 0.38, 0.76), color=color, edgecolor="white")
    for times_s in shown:
        axes.axvline(1e3 * (times_s[-1] - zero_s), color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(lanes)), [label for label, _, _ in lanes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (end_s - zero_s))
    axes.set_xlabel("ms; a dotted line is a verdict at the router, where a round ends")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def page(
    timeline: Timeline, *, provenance: Provenance, notes: Sequence[str], claims: str = ""
) -> str:
    """Return `docs/performance.md`: the explanation, with this timeline's numbers in it.

    Args:
        timeline: What was recorded.
        provenance: Where.
        notes: What a reader must know of it.
        claims: What a suite measured, as Markdown.
    """
    stages = timeline.stages_ms()
    whole_ms = sum(stages.values())
    values = {
        "heading": heading(asdict(provenance)).strip(),
        "notes": " ".join(notes),
        "claims": claims.strip() or "Not measured here yet; run `cascade bench suite`.",
        "rounds": str(len(timeline.rounds)),
        "round_ms": f"{whole_ms:.2f}",
        "drafter_passes": str(len(timeline.drafter_passes)),
    }
    for name, stage_ms in stages.items():
        values[f"{name}_ms"] = f"{stage_ms:.2f}"
        values[f"{name}_share"] = f"{100 * stage_ms / whole_ms:.1f} %"
    template = files("cascade.benchmark").joinpath("performance.md").read_text()
    return template.format(**values)
