"""`cascade bench`: how fast, compared with what, and where the time goes."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cascade.cli.ask import server_url
from cascade.cli.evaluate import failed
from cascade.cli.serve import read_settings
from cascade.engine import threads
from cascade.errors import CascadeError, InvalidMeasurement, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from cascade.benchmark.systems import Deployment
    from cascade.settings import Application

bench = typer.Typer(
    help="Measure speed: systems take turns, and ratios are paired by round.", no_args_is_help=True
)

Config = Annotated[Path | None, typer.Option(help="A cluster/*.yaml whose args to use")]
Out = Annotated[Path, typer.Option(help="Folder of the results")]
Pad = Annotated[
    str | None,
    typer.Option(help="Replace the expert by a synthetic model of this size, such as 500M"),
]
Threads = Annotated[
    int, typer.Option(min=0, help="Of the expert and baselines; 0: torch's default")
]
DrafterThreads = Annotated[int, typer.Option(min=0, help="Of the drafter; 0: torch's default")]
Ask = Annotated[
    list[str] | None,
    typer.Option(help="Such as lossless@4 or token_v3:0.9; repeat for more"),
]
RoundTrips = Annotated[
    list[float] | None, typer.Option(min=0, help="Round trip to emulate; repeat for more")
]
Dtype = Annotated[str | None, typer.Option(help="Of the expert and baselines: bfloat16, ...")]


_LOADING = "loading torch and transformers"
_DTYPES = ("float32", "bfloat16", "float16")


@bench.callback()
def prepare() -> None:
    """Set what torch reads when it is imported; let a termination also end the tiers."""
    os.environ.update(threads.environment())
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    """End as Ctrl-C does, so that what was started is stopped."""
    signal.raise_signal(signal.SIGINT)


@bench.command()
def run(  # noqa: PLR0913 - one parameter an option
    workload: Annotated[
        str, typer.Argument(help="A JSONL file, `families`, or names of some, with commas")
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
        list[str] | None,
        typer.Option(
            help="A baseline: assisted, batched, continuous (transformers), or llama-server[=PATH]"
            " (llama.cpp; without PATH the server of xllamacpp); repeat for more"
        ),
    ] = None,
    rtt_ms: RoundTrips = None,
    config: Config = None,
    pad: Pad = None,
    dtype: Dtype = None,
    expert_threads: Threads = 0,
    drafter_threads: DrafterThreads = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients of a closed loop")] = 1,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals per second instead")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="JSONL of times and prompts or lengths instead")
    ] = None,
    slo: Annotated[str, typer.Option(help="Goodput counts ttft=200,tpot=30,latency=2000")] = "",
    count: Annotated[int, typer.Option(min=1, help="Items of each family")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each system")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of items and arrivals")] = 0,
    out: Out = Path("bench"),
) -> None:
    """Compare variants, deployments and baselines: all answer the same requests, in turns."""
    _progress(_LOADING)
    from cascade.benchmark import load, metrics, plan, report  # noqa: PLC0415 - after `prepare`
    from cascade.evaluation import workloads  # noqa: PLC0415 - as above
    from cascade.evaluation.client import request_body  # noqa: PLC0415 - as above
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - as above

    with _exit_on_error():
        settings = _settings(config, pad, dtype, expert_threads, drafter_threads)
        items = workloads.load(workload, count=count, seed=seed).items
        bodies = [request_body(item, temperature=0) for item in items]
        arrivals: load.Load = load.ClosedLoop(concurrency=concurrency)
        if trace is not None:
            traced, arrivals = load.read_trace(trace, filler=_filler(settings, items))
            bodies = [body | {"temperature": 0} for body in traced]
        elif rate is not None:
            arrivals = load.poisson(rate=rate, count=len(bodies), seed=seed)
        planned = plan.Plan(
            settings=settings,
            bodies=bodies,
            load=arrivals,
            rounds=rounds,
            variants=ask or plan.VARIANTS,
            deployments=_deployments(url=url, here=here, apart=apart),
            rtts_ms=rtt_ms or [0.0],
            baselines=peer or (),
            slo=metrics.parse_slo(slo),
        )
        where = provenance()
        comparison = asyncio.run(plan.run_plan(planned, progress=_progress))
        notes = _notes(pad)
        document = report.document(
            comparison, notes=notes, provenance=where, arrivals=repr(arrivals)
        )
        Console(soft_wrap=True).print(report.table(document), markup=False)
        _print_paths(report.write(document, folder=out, name="bench"))


@bench.command()
def pad(
    *,
    parameters: Annotated[str, typer.Option(help="About how many: 120M, 500M, 1.2B, 7B, 30B")],
    out: Annotated[Path, typer.Option(help="Folder of the model")],
    source: Annotated[str, typer.Option(help="A Llama; the expert that ships if `demo`")] = "demo",
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32")] = "bfloat16",
) -> None:
    """Write a synthetic model: the text of its source at the cost of a larger model."""
    _progress(_LOADING)
    import torch  # noqa: PLC0415 - after `prepare`
    from transformers import AutoConfig  # noqa: PLC0415 - as above

    from cascade.benchmark import synthetic_model  # noqa: PLC0415 - as above
    from cascade.demo import EXPERT  # noqa: PLC0415 - as above

    with _exit_on_error():
        _check_dtype(dtype)
        path = str(EXPERT) if source == "demo" else source
        size = synthetic_model.parse_parameters(parameters)
        shape = synthetic_model.shape_for(size, AutoConfig.from_pretrained(path))
        _progress(f"writing {out}")
        written = synthetic_model.write(path, out=out, shape=shape, dtype=getattr(torch, dtype))
        Console().print(f"{out}: {written / 1e6:.0f}M parameters, cost-padded: {shape}")


@bench.command("load")
def load_model(
    model: Annotated[str, typer.Argument(help="Directory or repository")],
    *,
    dtype: Dtype = None,
    path: Annotated[str, typer.Option(help="Of the engine: auto, lean, flat or padded")] = "auto",
) -> None:
    """Measure the memory of loading a model on a CPU: its peak, and what stays."""
    _progress(_LOADING)
    from cascade.benchmark.load_memory import measure  # noqa: PLC0415 - after `prepare`
    from cascade.engine.settings import EngineSettings  # noqa: PLC0415 - as above
    from cascade.engine.settings import Path as EnginePath  # noqa: PLC0415 - as above

    with _exit_on_error():
        if dtype is not None:
            _check_dtype(dtype)
        if path not in set(EnginePath):
            raise InvalidMeasurement(f"--path is {path!r}; {wanted(path, EnginePath)}")
        settings: Any = {"dtype": dtype or "auto", "path": EnginePath(path)}
        _progress(f"loading {model}")
        memory = measure(model, settings=EngineSettings(**settings))
        weights, mib = memory.weights, 2**20
        Console(highlight=False, soft_wrap=True).print(
            f"{memory.runner}: weights {weights / mib:.0f} MiB; peak {memory.peak / mib:.0f} MiB "
            f"({memory.peak / weights:.2f}); afterwards {memory.after / mib:.0f} MiB "
            f"({memory.after / weights:.2f})"
        )


@bench.command()
def judge(  # noqa: PLR0913 - one parameter an option
    *,
    vocabulary: Annotated[
        list[int] | None, typer.Option(min=1000, help="Tokens; repeat for more; three if absent")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Of the logits: trained, or normal: sd 4, sd 2, sd 1; all if absent"),
    ] = None,
    sampling: Annotated[
        list[str] | None, typer.Option(help="Such as 'top_p 0.9'; repeat for more; all if absent")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Such as opt; repeat for more; all if absent")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each")] = 20,
    expert_threads: Threads = 0,
    model_pass: Annotated[
        bool, typer.Option(help="Also time the pass of a small model with as many tokens")
    ] = False,
) -> None:
    """Measure how long an expert takes to judge a block of 5 tokens, in milliseconds."""
    from cascade.benchmark import judging  # noqa: PLC0415 - after `prepare`

    console = Console(highlight=False, soft_wrap=True)
    with _exit_on_error():
        names = {
            "--shape": (shape, judging.SHAPES),
            "--sampling": (sampling, judging.SAMPLINGS),
            "--rule": (rule, judging.RULES),
        }
        for option, (asked, known) in names.items():
            if unknown := set(asked or ()) - set(known):
                name = min(unknown)
                raise InvalidMeasurement(f"{option} is {name!r}; {wanted(name, known)}")
        vocabularies = vocabulary or [262_144, 152_064, 128_256]
        rules = rule or list(judging.RULES)
        console.print(f"| vocabulary | logits | sampling | {' | '.join(rules)} |")
        console.print("|---" * (3 + len(rules)) + "|")
        for found in judging.measure(
            vocabularies=vocabularies,
            shapes=shape or list(judging.SHAPES),
            samplings=sampling or list(judging.SAMPLINGS),
            rules=rules,
            repeats=repeats,
            cores=expert_threads,
        ):
            times = " | ".join(f"{ms:.1f}" for ms in found.by_rule.values())
            console.print(f"| {found.vocabulary} | {found.shape} | {found.sampling} | {times} |")
        for size in vocabularies if model_pass else ():
            passed = judging.pass_ms(size, cores=expert_threads, repeats=repeats)
            console.print(f"a model's pass over the block, {size} tokens: {passed:.1f} ms")


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
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each system")] = 3,
    questions: Annotated[int, typer.Option(min=1, help="Of each family, for one stream")] = 2,
    router_rounds: Annotated[int, typer.Option(min=1000, help="Of the router's loop")] = 100_000,
    llama_server: Annotated[
        str, typer.Option(help="A llama-server binary; the server of xllamacpp if absent")
    ] = "",
    out: Out = Path("bench"),
) -> None:
    """Measure every speed that this server promises; an hour or two.

    What a report in the folder says of other cases is kept.
    """
    _progress(_LOADING)
    from cascade.benchmark import report  # noqa: PLC0415 - after `prepare`
    from cascade.benchmark.suite import CASES, SuiteOptions  # noqa: PLC0415 - as above
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - as above

    with _exit_on_error():
        if unknown := set(only or ()) - set(CASES):
            raise InvalidMeasurement(f"no case {min(unknown)!r}; {wanted(min(unknown), CASES)}")
        options = SuiteOptions(
            settings=_settings(config, None, dtype, expert_threads, drafter_threads),
            rounds=rounds,
            questions=questions,
            router_rounds=router_rounds,
            llama_server=llama_server,
        )
        for name in only or CASES:
            Console(stderr=True).rule(name)
            where = provenance()
            result = asyncio.run(CASES[name](options, _progress))
            paths = report.write_suite(name, result, folder=out, provenance=where)
            claims = report.suite_claims(report.read_suite(paths[0]), only=name)
            Console(soft_wrap=True).print(claims, markup=False)
            _print_paths(paths)


@bench.command()
def timeline(  # noqa: PLR0913 - one parameter an option
    question: Annotated[
        str, typer.Argument(help="What to ask; a long answer shows the rhythm")
    ] = "David buys 4 shells at 8 euros each and 2 books at 2 euros each, and pays with 100 euros."
    " How much does David get back?",
    *,
    ask: Annotated[str, typer.Option(help="Such as lossless@4 or token_v3:0.9")] = "lossless",
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
    _progress(_LOADING)
    from cascade.benchmark import report  # noqa: PLC0415 - after `prepare`
    from cascade.benchmark import timeline as timelines  # noqa: PLC0415 - as above
    from cascade.benchmark.plan import greedy, parse_variant  # noqa: PLC0415 - as above
    from cascade.evaluation.environment import provenance  # noqa: PLC0415 - as above

    with _exit_on_error():
        settings = _settings(config, pad, dtype, expert_threads, drafter_threads)
        where = provenance()
        claims = ""
        if promises is not None:
            claims = report.suite_claims(report.read_suite(promises), with_headings=True)
        body = greedy(question) | {"cascade": parse_variant(ask)}
        _progress("starting the pair, and asking it")
        found = asyncio.run(timelines.record(settings, body, rtt_ms=rtt_ms))
        notes = _notes(pad)
        if rtt_ms:
            notes.append(f"A round trip of {rtt_ms:g} ms is emulated.")
        out.mkdir(parents=True, exist_ok=True)
        timelines.picture(found, out / "timeline.png")
        page = timelines.page(found, provenance=where, notes=notes, claims=claims)
        (out / "performance.md").write_text(page)
        Console(soft_wrap=True).print(f"{out}/performance.md: {found.stages_ms()}", markup=False)


@contextmanager
def _exit_on_error() -> Generator[None]:
    """End the program with one line for an error of ours."""
    try:
        yield
    except CascadeError as error:
        raise failed(error) from error


def _progress(line: str) -> None:
    Console(stderr=True).print(line, markup=False)


def _print_paths(paths: Sequence[Path]) -> None:
    _progress(f"written: {', '.join(map(str, paths))}")


def _notes(parameters: str | None) -> list[str]:
    from cascade.benchmark.synthetic_model import provenance_note  # noqa: PLC0415 - after `prepare`

    return [provenance_note(parameters)] if parameters else []


def _settings(
    config: Path | None,
    pad: str | None,
    dtype: str | None,
    expert_threads: int,
    drafter_threads: int,
) -> Application:
    from cascade.benchmark.plan import with_engine  # noqa: PLC0415 - after `prepare`
    from cascade.benchmark.synthetic_model import with_synthetic_expert  # noqa: PLC0415 - as above

    settings = with_engine(read_settings(config), "drafter", threads=drafter_threads)
    settings = with_engine(settings, "expert", threads=expert_threads)
    if dtype:
        _check_dtype(dtype)
        settings = with_engine(settings, "expert", dtype=dtype)
    return with_synthetic_expert(settings, parameters=pad) if pad else settings


def _check_dtype(name: str) -> None:
    if name not in _DTYPES:
        raise InvalidMeasurement(f"--dtype is {name!r}; {wanted(name, _DTYPES)}")


def _filler(settings: Application, items: Sequence[Any]) -> Callable[[int], list[int]]:
    """Return what makes prompts of a given length: the text of the workload, repeated."""
    text = " ".join(item.messages[-1].content for item in items)
    tokens = settings.pair().tokenizer.encode(text)
    return lambda length: list(islice(cycle(tokens), length))


def _deployments(*, url: str | None, here: bool | None, apart: bool) -> list[Deployment]:
    from cascade.benchmark import systems  # noqa: PLC0415 - after `prepare`

    chosen: list[Deployment] = []
    if here or not (url or apart):
        chosen.append(systems.one_process)
    if apart:
        chosen.append(systems.separate_processes)
    if url:
        api_key = os.environ.get("CASCADE_API_KEY")
        chosen.append(partial(systems.running_server, url=server_url(url), api_key=api_key))
    return chosen
