"""Where the time of a round goes: one answer over both tiers in this process, watched from outside.

Nothing in the server knows of it: passes, items and answers are noted by what stands around the
parts. All clocks are one, since all runs in one process; items still cross gRPC on loopback.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial, wraps
from importlib.resources import files
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.processes import routed
from cascade.benchmark.report import heading
from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import InProcess
from cascade.evaluation.scoring import extra
from cascade.local import local_server
from cascade.protocol.client import ReplicaClients
from cascade.protocol.messages import Judge, Judgement

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

    from cascade.evaluation.environment import Provenance
    from cascade.protocol.client import SessionStream
    from cascade.protocol.services import TierKind
    from cascade.replica.replica import Replica
    from cascade.settings import Application
    from cascade.types import SessionId

Json: TypeAlias = dict[str, Any]

STAGES = ("draft", "send", "queue", "pass", "return")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass of a tier, with drawing or judging; seconds of this process's clock."""

    tier: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that happened at a moment: `sent`, `received` or `heard`, and of what."""

    what: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round by the moments at which it changed hands, in seconds of this process's clock."""

    began_s: float  # the verdict before was heard
    sent_s: float  # the router sent the block to the expert
    received_s: float  # the expert's process had it
    pass_s: float  # its pass began
    judged_s: float  # its pass ended
    heard_s: float  # the router had the verdict

    def stages_ms(self) -> dict[str, float]:
        """Return what each stage took: they add up to the round."""
        moments = (
            self.began_s, self.sent_s, self.received_s, self.pass_s, self.judged_s, self.heard_s,
        )  # fmt: skip
        spans = pairwise(moments)
        return {name: 1e3 * (end - start) for name, (start, end) in zip(STAGES, spans, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One answer's rounds and all passes meanwhile."""

    rounds: tuple[Round, ...]
    passes: tuple[Pass, ...]
    statistics: Json

    def stages_ms(self) -> dict[str, float]:
        """Return the median of each stage over rounds."""
        found = [one.stages_ms() for one in self.rounds]
        return {name: median(one[name] for one in found) for name in STAGES}


class Recorder:
    """Notes what parts do, from outside."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.passes: list[Pass] = []
        self.notes: list[Note] = []
        self._clock = clock
        self._began_s: dict[str, float] = {}

    def clear(self) -> None:
        """Forget what has been."""
        self.passes.clear()
        self.notes.clear()

    def watch_replica(self, replica: Replica[Any], *, tier: str) -> None:
        """Note a replica's passes, and the items that it receives."""
        run, judge, receive = replica.engine.runner.forward, replica.finish, replica.receive

        @wraps(run)
        def forward(*args: Any, **more: Any) -> Any:
            self._began_s[tier] = self._clock()
            return run(*args, **more)

        @wraps(judge)
        def finish(*args: Any, **more: Any) -> Any:
            found = judge(*args, **more)
            began_s = self._began_s.pop(tier, None)
            if began_s is not None:
                self.passes.append(Pass(tier=tier, began_s=began_s, ended_s=self._clock()))
            return found

        @wraps(receive)
        def received(connection: Any, item: Any) -> None:
            self._note("received", item)
            receive(connection, item)

        replica.engine.runner.forward = forward
        replica.finish = finish
        replica.receive = received

    def watch_link(self, link: SessionStream) -> SessionStream:
        """Note what goes over a link and what comes."""
        send, deliver = link.send, link.deliver

        @wraps(send)
        def sent(item: Any) -> None:
            self._note("sent", item)
            send(item)

        @wraps(deliver)
        def heard(answer: Any, size: int) -> None:
            self._note("heard", answer)
            deliver(answer, size)

        link.send, link.deliver = sent, heard
        return link

    def _note(self, what: str, item: object) -> None:
        self.notes.append(Note(what=f"{what} {type(item).__name__}", at_s=self._clock()))


class WatchedPeers(ReplicaClients):
    """Peers whose links are watched."""

    def __init__(self, kind: TierKind, *, recorder: Recorder, delay_s: float = 0.0) -> None:
        super().__init__(kind, delay_s=delay_s)
        self._recorder = recorder

    def open_stream(self, address: str, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a watched link."""
        return self._recorder.watch_link(super().open_stream(address, session_id, epoch))


async def record(settings: Application, body: Json, *, delay_s: float = 0.0) -> Timeline:
    """Return the timeline of one answer; the same question has been answered once before.

    Raises:
        InvalidMeasurement: The answer had fewer than three rounds.
        StartupError: The pair cannot be served.
    """
    recorder = Recorder()
    async with _watched(settings, recorder, delay_s) as answerer:
        await answerer.answer(body)
        recorder.clear()
        answer = await answerer.answer(body)
    rounds = rounds_of(recorder.notes, recorder.passes)
    if len(rounds) < 2:  # noqa: PLR2004 - one would be no rhythm
        raise InvalidMeasurement(
            f"the answer took {answer.statistics.get('rounds')} rounds, too few to show a rhythm;"
            " ask for fewer drafted tokens or for a longer answer"
        )
    return Timeline(rounds=rounds, passes=tuple(recorder.passes), statistics=answer.statistics)


def rounds_of(notes: Sequence[Note], passes: Sequence[Pass]) -> tuple[Round, ...]:
    """Return the rounds between two verdicts; the first, which has none before it, is left out."""
    heard = _times(notes, f"heard {Judgement.__name__}")
    received = _times(notes, f"received {Judge.__name__}")
    judging = [one for one in passes if one.tier == "expert"]
    found: list[Round] = []
    for sent_s in _times(notes, f"sent {Judge.__name__}"):
        before = [time_s for time_s in heard if time_s <= sent_s]
        arrived = next((time_s for time_s in received if time_s >= sent_s), None)
        own = next((p for p in judging if arrived is not None and p.began_s >= arrived), None)
        # The verdict leaves while the head is still at its end: it may be heard before that.
        after = next((t for t in heard if own is not None and t >= own.began_s), None)
        if not before or arrived is None or own is None or after is None:
            continue
        found.append(
            Round(
                began_s=before[-1], sent_s=sent_s, received_s=arrived,
                pass_s=own.began_s, judged_s=min(own.ended_s, after), heard_s=after,
            )
        )  # fmt: skip
    return tuple(found)


def picture(timeline: Timeline, path: Path, *, rounds: int = 4) -> None:
    """Draw the first rounds of a timeline: a lane for each place, time to the right."""
    extra("matplotlib").use("agg")
    pyplot = extra("matplotlib.pyplot")
    shown = timeline.rounds[:rounds]
    zero_s, end_s = shown[0].began_s, shown[-1].heard_s
    figure, axes = pyplot.subplots(figsize=(11, 3.4), layout="constrained")
    for lane, bars in enumerate(_lanes(timeline, shown)):
        inside = [bar for bar in bars.spans if bar[0] < end_s and bar[1] > zero_s]
        places = [(1e3 * (start - zero_s), 1e3 * (end - start)) for start, end in inside]
        axes.broken_barh(places, (lane - 0.38, 0.76), color=bars.color, edgecolor="white")
    for one in shown:
        axes.axvline(1e3 * (one.heard_s - zero_s), color="black", linewidth=0.8, linestyle=":")
    names = [bars.name for bars in _lanes(timeline, shown)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (end_s - zero_s))
    axes.set_xlabel("ms; a dotted line is a verdict at the router, where a round ends")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    name: str
    color: str
    spans: list[tuple[float, float]]


def _lanes(timeline: Timeline, shown: Sequence[Round]) -> list[_Lane]:
    drafting = [(one.began_s, one.ended_s) for one in timeline.passes if one.tier == "drafter"]
    return [
        _Lane(name="drafter's passes", color="#d9822b", spans=drafting),
        _Lane(
            name="router waits for a block",
            color="#b0b7bf",
            spans=[(one.began_s, one.sent_s) for one in shown],
        ),
        _Lane(
            name="block to the expert",
            color="#8fb7d3",
            spans=[(one.sent_s, one.received_s) for one in shown],
        ),
        _Lane(
            name="expert's queue",
            color="#b0b7bf",
            spans=[(one.received_s, one.pass_s) for one in shown],
        ),
        _Lane(
            name="expert's pass",
            color="#2f6f9f",
            spans=[(one.pass_s, one.judged_s) for one in shown],
        ),
        _Lane(
            name="verdict to the router",
            color="#8fb7d3",
            spans=[(one.judged_s, one.heard_s) for one in shown],
        ),
    ]


def page(
    timeline: Timeline, *, provenance: Provenance, notes: Sequence[str], promises: str = ""
) -> str:
    """Return `docs/performance.md`: the explanation, with this timeline's figures in it.

    Args:
        timeline: What was recorded.
        provenance: Where.
        notes: What a reader must know of it.
        promises: What a suite found, as Markdown.
    """
    stages = timeline.stages_ms()
    whole = sum(stages.values())
    template = files("cascade.benchmark").joinpath("performance.md").read_text()
    figures = {f"{name}_ms": f"{stages[name]:.2f}" for name in STAGES}
    shares = {f"{name}_share": f"{100 * stages[name] / whole:.1f} %" for name in STAGES}
    told = {
        "heading": heading(asdict(provenance)).strip(),
        "notes": " ".join(notes),
        "promises": promises.strip() or "Not measured here yet: `cascade bench suite` does.",
        "rounds": str(len(timeline.rounds)),
        "round_ms": f"{whole:.2f}",
        "drafter_passes": str(sum(one.tier == "drafter" for one in timeline.passes)),
    }
    for name, value in (figures | shares | told).items():
        template = template.replace(f"{{{name}}}", value)
    return template


def _times(notes: Sequence[Note], what: str) -> list[float]:
    return [note.at_s for note in notes if note.what == what]


@asynccontextmanager
async def _watched(
    settings: Application, recorder: Recorder, delay_s: float
) -> AsyncGenerator[InProcess]:
    async with local_server(settings) as running:
        recorder.watch_replica(running.drafter, tier="drafter")
        recorder.watch_replica(running.expert, tier="expert")
        async with routed(
            settings,
            drafter=running.drafter.address,
            expert=running.expert.address,
            token=running.token,
            peers=partial(WatchedPeers, recorder=recorder, delay_s=delay_s),
        ) as service:
            yield InProcess(service, name="watched")
