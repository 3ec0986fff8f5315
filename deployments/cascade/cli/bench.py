"""`cascade bench`: how fast, against whom, and where the time goes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cascade.cli.evaluate import failed
from cascade.cli.tier import application
from cascade.engine import threads
from cascade.errors import CascadeError, InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.benchmark.load import Arrivals
    from cascade.benchmark.plan import Json, Plan, Where
    from cascade.benchmark.suite import Scale
    from cascade.settings import Application

bench = typer.Typer(
    help="Measure speed: contenders take turns, and ratios are paired.", no_args_is_help=True
)

Config = Annotated[Path | None, typer.Option(help="A cluster/*.yaml whose args to take")]
Out = Annotated[Path, typer.Option(help="Folder of the results")]
Pad = Annotated[
    str | None, typer.Option(help="Cost-pad the expert to so many parameters, such as 500M")
]
Threads = Annotated[int, typer.Option(min=0, help="Of the expert and of peers; 0: torch's own")]
DrafterThreads = Annotated[int, typer.Option(min=0, help="Of the drafter; 0: torch's own")]
Ask = Annotated[
    list[str] | None,
    typer.Option(help="CURVE[:DIAL][@DRAFT_TOKENS]; the first is the baseline; repeat"),
]
RoundTrips = Annotated[
    list[float] | None, typer.Option(min=0, help="Round trip to emulate; repeat for more")
]
Dtype = Annotated[str | None, typer.Option(help="Of the expert and of peers: bfloat16, ...")]


@bench.callback()
def prepare() -> None:
    """Set what torch reads when it is imported; let a termination end the tiers too."""
    os.environ.update(threads.environment())
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    """End as an interrupt from the keyboard does: it lets what was begun be ended."""
    del number, frame
    signal.raise_signal(signal.SIGINT)


@bench.command()
def run(  # noqa: PLR0913 - one parameter an option
    workload: Annotated[
        str, typer.Argument(help="A JSONL file, `families`, or the name of one family")
    ] = "problems",
    *,
    ask: Ask = None,
    url: Annotated[str | None, typer.Option(help="A running server")] = None,
    here: Annotated[
        bool | None, typer.Option("--here", help="Both tiers in this process (the default)")
    ] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="Each tier in a process of its own")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="assisted, batched or continuous; repeat for more")
    ] = None,
    rtt_ms: RoundTrips = None,
    config: Config = None,
    pad: Pad = None,
    dtype: Dtype = None,
    expert_threads: Threads = 0,
    drafter_threads: DrafterThreads = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients of a closed loop")] = 1,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals a second instead")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="JSONL of times and prompts or lengths instead")
    ] = None,
    slo: Annotated[str, typer.Option(help="Goodput counts ttft=200,tpot=30,latency=2000")] = "",
    count: Annotated[int, typer.Option(min=1, help="Items of each family")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of items and arrivals")] = 0,
    out: Out = Path("bench"),
) -> None:
    """Let ways of asking, arrangements and peers answer the same requests in turns."""
    from cascade.benchmark.metrics import parse_objective  # noqa: PLC0415 - after `prepare`
    from cascade.benchmark.plan import ASKS, Plan  # noqa: PLC0415 - as above

    with _told():
        settings = _settings(config, pad, dtype, expert_threads, drafter_threads)
        bodies, arrivals = _requests(
            settings,
            workload=workload,
            count=count,
            seed=seed,
            concurrency=concurrency,
            rate=rate,
            trace=trace,
        )
        plan = Plan(
            settings=settings,
            bodies=bodies,
            arrivals=arrivals,
            rounds=rounds,
            asks=ask or ASKS,
            where=_where(url=url, here=here, apart=apart),
            rtts_ms=rtt_ms or [0.0],
            peers=peer or (),
            objective=parse_objective(slo),
        )
        _report(plan, out=out, padded=pad)


@bench.command()
def pad(
    *,
    parameters: Annotated[str, typer.Option(help="About how many: 120M, 500M, 1.2B, 7B, 30B")],
    out: Annotated[Path, typer.Option(help="Folder of the model")],
    source: Annotated[str, typer.Option(help="A Llama; the expert that ships if `demo`")] = "demo",
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32")] = "bfloat16",
) -> None:
    """Write a cost-padded model: it says what the source says, at the cost of a larger one."""
    import torch  # noqa: PLC0415 - after `prepare`
    from transformers import AutoConfig  # noqa: PLC0415 - as above

    from cascade.benchmark import synthetic_model  # noqa: PLC0415 - as above
    from cascade.demo import EXPERT  # noqa: PLC0415 - as above

    with _told():
        place = str(EXPERT) if source == "demo" else source
        wanted = synthetic_model.parse_parameters(parameters)
        shape = synthetic_model.shape_for(wanted, AutoConfig.from_pretrained(place))
        written = synthetic_model.pad(place, out=out, shape=shape, dtype=getattr(torch, dtype))
        Console().print(f"{out}: {written / 1e6:.0f}M parameters, cost-padded: {shape}")


@bench.command()
def suite(  # noqa: PLR0913 - one parameter an option
    *,
    only: Annotated[
        list[str] | None, typer.Option(help="A case of the suite; repeat for more; all if absent")
    ] = None,
    config: Config = None,
    dtype: Dtype = "bfloat16",
    expert_threads: Threads = 0,
    drafter_threads: DrafterThreads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender")] = 3,
    questions: Annotated[int, typer.Option(min=1, help="Of each family, for one stream")] = 2,
    router_rounds: Annotated[int, typer.Option(min=1000, help="Of the router's loop")] = 100_000,
    out: Out = Path("bench"),
) -> None:
    """Measure every line of what this server promises of its speed; about an hour.

    What a report in the folder says of other cases stays.
    """
    from cascade.benchmark.suite import CASES, Scale  # noqa: PLC0415 - after `prepare`

    with _told():
        if unknown := set(only or ()) - set(CASES):
            raise InvalidMeasurement(f"no case {min(unknown)!r}; there are {', '.join(CASES)}")
        scale = Scale(
            settings=_settings(config, None, dtype, expert_threads, drafter_threads),
            rounds=rounds,
            questions=questions,
            router_rounds=router_rounds,
        )
        _suite(scale, only or list(CASES), out=out)


@bench.command()
def timeline(  # noqa: PLR0913 - one parameter an option
    question: Annotated[
        str, typer.Argument(help="What to ask; a long answer shows the rhythm")
    ] = "David buys 4 shells at 8 euros each and 2 books at 2 euros each, and pays with 100 euros."
    " How much does David get back?",
    *,
    ask: Annotated[str, typer.Option(help="CURVE[:DIAL][@DRAFT_TOKENS]")] = "lossless",
    rtt_ms: Annotated[float, typer.Option(min=0, help="Round trip to emulate")] = 0.0,
    config: Config = None,
    pad: Pad = "500M",
    dtype: Dtype = "bfloat16",
    expert_threads: Threads = 0,
    drafter_threads: DrafterThreads = 1,
    promises: Annotated[
        Path | None, typer.Option(help="A suite.json whose promises to put on the page")
    ] = None,
    out: Out = Path("docs"),
) -> None:
    """Write performance.md and its picture: where the time of a round goes."""
    from cascade.benchmark import suite  # noqa: PLC0415 - after `prepare`
    from cascade.benchmark import timeline as lab  # noqa: PLC0415 - as above
    from cascade.benchmark.plan import greedy, parse_ask  # noqa: PLC0415 - as above
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - as above

    with _told():
        settings = _settings(config, pad, dtype, expert_threads, drafter_threads)
        where = provenance()
        told = {"cases": {}} if promises is None else suite.read(promises)
        body = greedy(question) | {"cascade": parse_ask(ask)}
        found = asyncio.run(lab.record(settings, body, delay_s=rtt_ms / 2e3))
        notes = [_padded_note(pad)] if pad else []
        if rtt_ms:
            notes.append(f"A round trip of {rtt_ms:g} ms is emulated.")
        out.mkdir(parents=True, exist_ok=True)
        lab.picture(found, out / "timeline.png")
        page = lab.page(found, provenance=where, notes=notes, promises=suite.promised(told))
        (out / "performance.md").write_text(page)
        Console(soft_wrap=True).print(f"{out}/performance.md: {found.stages_ms()}", markup=False)


def _padded_note(parameters: str) -> str:
    return f"The expert is cost-padded to {parameters} parameters; its text is its own."


def _suite(scale: Scale, names: Sequence[str], *, out: Path) -> None:
    """Run cases one after another; what is finished is written after each."""
    from cascade.benchmark.suite import (  # noqa: PLC0415 - after `prepare`
        CASES,
        claim_table,
        write,
    )
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - as above

    console = Console(stderr=True)
    for name in names:
        console.rule(name)
        where = provenance()
        case = CASES[name](scale, lambda line: console.print(line, markup=False))
        outcome = asyncio.run(case)
        paths = write(name, outcome, folder=out, provenance=where)
        Console(soft_wrap=True).print(claim_table(outcome.claims), markup=False)
        console.print(f"written: {', '.join(map(str, paths))}", markup=False)


class _told:  # noqa: N801 - reads as a statement
    """Ends the program with one line where something cannot be measured."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, CascadeError):
            raise failed(error) from error


def _settings(
    config: Path | None,
    pad: str | None,
    dtype: str | None,
    expert_threads: int,
    drafter_threads: int,
) -> Application:
    from cascade.benchmark.plan import padded_expert  # noqa: PLC0415 - after `prepare`

    settings = application(config)
    expert: dict[str, Any] = {"threads": expert_threads} | ({"dtype": dtype} if dtype else {})
    changed = {
        "expert": _with(settings.expert, expert),
        "drafter": _with(settings.drafter, {"threads": drafter_threads}),
    }
    settings = settings.model_copy(update=changed)
    return padded_expert(settings, parameters=pad) if pad else settings


def _with(tier: Any, engine: dict[str, Any]) -> Any:
    return tier.model_copy(update={"engine": tier.engine.model_copy(update=engine)})


def _requests(  # noqa: PLR0913 - what and when
    settings: Application,
    *,
    workload: str,
    count: int,
    seed: int,
    concurrency: int,
    rate: float | None,
    trace: Path | None,
) -> tuple[list[Json], Arrivals]:
    from cascade.benchmark.load import Closed, poisson, read_trace  # noqa: PLC0415 - as above
    from cascade.evaluation import workloads  # noqa: PLC0415 - after `prepare`
    from cascade.evaluation.client import body  # noqa: PLC0415 - as above

    items = workloads.load(workload, count=count, seed=seed).items
    if trace is not None:
        filler = _filler(settings, items)
        bodies, arrivals = read_trace(trace, filler=filler)
        return [asked | {"temperature": 0} for asked in bodies], arrivals
    bodies = [body(item, temperature=0) for item in items]
    if rate is not None:
        return bodies, poisson(rate=rate, count=len(bodies), seed=seed)
    return bodies, Closed(concurrency=concurrency)


def _filler(settings: Application, items: Sequence[Any]) -> Any:
    """Return what makes up prompts of a length: the text of the workload, from its beginning."""
    words = settings.pair().tokenizer
    text = " ".join(item.messages[-1].content for item in items)
    tokens = words.encode(text)

    def fill(length: int) -> list[int]:
        return [tokens[place % len(tokens)] for place in range(length)]

    return fill


def _where(*, url: str | None, here: bool | None, apart: bool) -> list[Where]:
    from cascade.benchmark.plan import Apart, Here, Server  # noqa: PLC0415 - after `prepare`

    chosen: list[Where] = [Here()] if here or (here is None and not url and not apart) else []
    if apart:
        chosen.append(Apart())
    if url:
        chosen.append(Server(url=url, api_key=os.environ.get("CASCADE_API_KEY")))
    if not chosen:
        raise InvalidMeasurement("nobody answers: give --here, --apart or --url")
    return chosen


def _report(plan: Plan, *, out: Path, padded: str | None) -> None:
    from cascade.benchmark.plan import execute  # noqa: PLC0415 - as above
    from cascade.benchmark.report import document, table, write  # noqa: PLC0415 - as above
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - after `prepare`

    console = Console(stderr=True)
    where = provenance()
    contest = asyncio.run(execute(plan, told=lambda line: console.print(line, markup=False)))
    told = document(
        contest,
        baseline=contest.standings[0].name,
        notes=[_padded_note(padded)] if padded else [],
        provenance=where,
        arrivals=repr(plan.arrivals),
    )
    paths = write(told, folder=out, name="bench")
    Console(soft_wrap=True).print(table(told), markup=False)
    console.print(f"written: {', '.join(map(str, paths))}", markup=False)
