"""The suite: each line of what this server promises of its speed, measured in one go.

A case runs a contest or a loop of its own and holds what it found against what is promised. Models
other than the pair that ships are the expert, cost-padded: its text and acceptance at the cost of a
larger model (`lab.padded`). Answers are greedy, from held-out items.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cascade.benchmark import microbench
from cascade.benchmark.load import Closed
from cascade.benchmark.metrics import of_ideal
from cascade.benchmark.plan import Apart, Direct, Here, Plan, execute, padded_expert, questions
from cascade.benchmark.report import document, heading, table
from cascade.engine.model_loader import adopt
from cascade.engine.settings import EngineSettings
from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks import Level
from cascade.types import DecodingParams, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from cascade.benchmark.metrics import Figures
    from cascade.benchmark.plan import Where
    from cascade.benchmark.runner import Contest, Gauge
    from cascade.evaluation.environment import Provenance
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One promise, and what was measured."""

    case: str
    says: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def held(self) -> bool:
        """Whether it is so."""
        return (self.least is None or self.measured >= self.least) and (
            self.most is None or self.measured <= self.most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a case found; `contests` by name, with what a reader must know of each."""

    claims: tuple[Claim, ...]
    contests: Mapping[str, tuple[Contest, str]]


def write(name: str, outcome: Outcome, *, folder: Path, provenance: Provenance) -> list[Path]:
    """Write what a case found as JSON and as Markdown; return the paths.

    What other cases found before stays, each with where and when it was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "suite.json", folder / "suite.md"]
    known: Json = read(paths[0])["cases"] if paths[0].exists() else {}
    told = {"cases": known | {name: _told(outcome, provenance)}}
    paths[0].write_text(json.dumps(told, indent=1))
    paths[1].write_text(report(told))
    return paths


def read(path: Path) -> Json:
    """Return what `write` wrote.

    Raises:
        InvalidMeasurement: The file is no such thing.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidMeasurement(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict) or "cases" not in told:
        raise InvalidMeasurement(
            f"{path} is no report of `cascade bench suite`; choose another --out, or remove it"
        )
    return told  # pyright: ignore[reportUnknownVariableType] - JSON


def report(told: Json) -> str:
    """Return all that a suite found as Markdown: its claims, and the contests behind them."""
    parts = [summary(told)]
    for name, case in told["cases"].items():
        parts += [f"## {name}", heading(case["provenance"])]
        parts += [
            f"### {contest}\n\n{table(found, headed=False)}"
            for contest, found in case["contests"].items()
        ]
    return "\n".join(parts)


def summary(told: Json) -> str:
    """Return the claims of all cases as Markdown, a line each."""
    rows = [
        (_claim(one), _when(case["provenance"]))
        for case in told["cases"].values()
        for one in case["claims"]
    ]
    return claim_table([claim for claim, _ in rows], [when for _, when in rows])


def promised(told: Json) -> str:
    """Return the claims of all cases as Markdown, and how each case was measured."""
    if not told["cases"]:
        return ""
    parts = [f"**{name}**: {heading(case['provenance'])}" for name, case in told["cases"].items()]
    return "\n".join([summary(told), *parts])


def claim_table(claims: Sequence[Claim], measured_at: Sequence[str] = ()) -> str:
    """Return claims as Markdown, a line each; `measured_at` says at which commit and when."""
    lines = ["| case | what | wanted | measured | held |", "| --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {claim.case} | {claim.says} | {_wanted(claim)} | {claim.measured:.3g} |"
        f" {'yes' if claim.held else '**no**'} |"
        for claim in claims
    ]
    if measured_at:
        more = [" commit, UTC |", " --- |", *(f" {where} |" for where in measured_at)]
        lines = [line + end for line, end in zip(lines, more, strict=True)]
    return "\n".join(lines) + "\n"


def _told(outcome: Outcome, provenance: Provenance) -> Json:
    return {
        "provenance": asdict(provenance),
        "claims": [asdict(claim) | {"held": claim.held} for claim in outcome.claims],
        "contests": {
            name: document(
                contest,
                baseline=contest.standings[0].name,
                notes=[note] if note else [],
                provenance=provenance,
            )
            for name, (contest, note) in outcome.contests.items()
        },
    }


def _when(provenance: Json) -> str:
    return f"{provenance['commit'] or 'unknown'}, {provenance['at'][:16]}"


def _claim(told: Json) -> Claim:
    return Claim(**{name: value for name, value in told.items() if name != "held"})


def _wanted(claim: Claim) -> str:
    bounds = (("at least", claim.least), ("at most", claim.most))
    return ", ".join(f"{word} {bound:.3g}" for word, bound in bounds if bound is not None)


Told: TypeAlias = "Callable[[str], object]"

EASY, HARD = (Level.EASY,), (Level.HARD, Level.HARDEST)

_ALL = (*EASY, Level.MIDDLE, *HARD)

_GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))

_PEER = "transformers assisted"

_CONTEXT_TOKENS = 64  # about where the middle of an answer is

_PASSES = 4  # of the expert alone over blocks of each length, after each round

_WIDE_VOCABULARY = 32_000

_JUDGED = {
    "sampled": SamplingParams(),
    "top-p 0.95": SamplingParams(top_p=0.95),
    "top-k 50": SamplingParams(top_k=50),
    "repetition penalty 1.1": SamplingParams(repetition_penalty=1.1),
}

_MEBIBYTE = 2**20

_PROCESSES = Apart()  # as a cluster has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How long the suite may take."""

    settings: Application  # the pair that ships, with its threads
    rounds: int = 3
    questions: int = 2  # of each family, for one stream; for several streams as many for each
    router_rounds: int = 100_000


async def one_stream(scale: Scale, told: Told) -> Outcome:
    """One stream over an expert of 500M: near the ideal, and ahead of `transformers`."""
    return await _alone(scale, told, case="one stream, 500M")


async def one_stream_float32(scale: Scale, told: Told) -> Outcome:
    """The same in the type that an expert has on a CPU if its settings name none."""
    expert = scale.settings.expert
    engine = expert.engine.model_copy(update={"dtype": "float32"})
    settings = scale.settings.model_copy(
        update={"expert": expert.model_copy(update={"engine": engine})}
    )
    return await _alone(replace(scale, settings=settings), told, case="one stream, 500M, float32")


async def _alone(scale: Scale, told: Told, *, case: str) -> Outcome:
    plan = _plan(scale, parameters="500M", streams=1)
    plan = replace(
        plan,
        bodies=[body | {"cascade": {"trace": True}} for body in plan.bodies],
        asks=("expert_only", "lossless", "token_v3:0.9"),
        peers=("assisted",),
    )
    fast, slow, loose = (f"{ask}, apart" for ask in ("lossless", "expert_only", "token_v3:0.9"))
    gauge = _share_of_ideal(plan.settings, fast)
    contest = await execute(replace(plan, gauge=gauge), told=told)
    ideal = median(contest.gauged)
    alone = contest.ratio(fast, slow).median
    free = contest.ratio(loose, slow).median
    peer = contest.ratio(fast, _peer(contest)).median
    return Outcome(
        claims=(
            Claim(case=case, says="share of the ideal, lossless", measured=ideal, least=0.9),
            Claim(case=case, says="lossless over the expert alone", measured=alone, least=2.5),
            Claim(case=case, says="token_v3 over the expert alone", measured=free, least=alone),
            Claim(case=case, says=f"lossless over {_peer(contest)}", measured=peer, least=1.25),
        ),
        contests={case: (contest, _padded("500M"))},
    )


async def sixteen_streams(scale: Scale, told: Told) -> Outcome:
    """Sixteen streams over an expert of 120M: ahead of all that `transformers` offers."""
    plan = _plan(scale, parameters="120M", streams=16)
    peers = ("assisted", "batched", "continuous")
    contest = await execute(replace(plan, peers=peers), told=told)
    batching = ("transformers batched", "transformers continuous batching")
    best = max(batching, key=lambda name: contest[name].middle.tokens_per_s)
    case = "16 streams, 120M"
    serial = contest.ratio("lossless, apart", _peer(contest)).median
    batched = contest.ratio("lossless, apart", best).median
    return Outcome(
        claims=(
            Claim(case=case, says=f"lossless over {_peer(contest)}", measured=serial, least=4),
            Claim(case=case, says=f"lossless over {best}", measured=batched, least=1.3),
        ),
        contests={case: (contest, _padded("120M"))},
    )


async def apart(scale: Scale, told: Told) -> Outcome:
    """Three processes against one, and over a network."""
    plan = _plan(scale, parameters="500M", streams=1)
    plan = replace(plan, where=(Direct(), Apart()), rtts_ms=(0.0, 5.0, 20.0))
    contest = await execute(plan, told=told)
    one, three = "lossless, one process", "lossless, apart"
    kept = contest.ratio(three, one).median
    near = contest.ratio(f"{three}, 5 ms", three).median
    far = contest.ratio(f"{three}, 20 ms", "expert_only, apart, 20 ms").median
    case = "three processes, one stream, 500M"
    return Outcome(
        claims=(
            Claim(case=case, says="three processes over one", measured=kept, least=0.93),
            Claim(case=case, says="5 ms of round trip over none", measured=near, least=0.9),
            Claim(case=case, says="20 ms, over the expert alone", measured=far, least=1.0),
        ),
        contests={case: (contest, _padded("500M"))},
    )


async def draft_lengths(scale: Scale, told: Told) -> Outcome:
    """`auto` against every fixed draft length, easy and hard, few and many, near and far."""
    fixed = tuple(f"lossless@{tokens}" for tokens in (0, 1, 2, 3, 5, 8))
    claims: list[Claim] = []
    contests: dict[str, tuple[Contest, str]] = {}
    kinds = (("easy", EASY), ("hard", HARD))
    for (kind, levels), streams, rtt_ms in itertools.product(kinds, (1, 16), (0.0, 10.0)):
        plan = _plan(scale, parameters="120M", streams=streams, levels=levels)
        plan = replace(plan, asks=("lossless@auto", *fixed), rtts_ms=(rtt_ms,))
        if streams == 1:  # its turns are short
            plan = replace(plan, rounds=2 * plan.rounds)
        contest = await execute(plan, told=told)
        tail = ", apart" + (f", {rtt_ms:g} ms" if rtt_ms else "")
        best = max(fixed, key=lambda ask: contest[ask + tail].middle.tokens_per_s)
        case = f"auto, {kind}, {streams} streams, {rtt_ms:g} ms"
        against = contest.ratio("lossless@auto" + tail, best + tail).median
        none = contest.ratio("lossless@auto" + tail, "lossless@0" + tail).median
        claims += [
            Claim(case=case, says=f"auto over the best, {best}", measured=against, least=0.95),
            Claim(case=case, says="auto over no drafts", measured=none, least=0.97),
        ]
        contests[case] = (contest, _padded("120M"))
    return Outcome(claims=tuple(claims), contests=contests)


async def deferrals(scale: Scale, told: Told) -> Outcome:
    """A rule of the drafter alone asks the expert only where it defers."""
    plan = _plan(scale, parameters=None, streams=1, levels=EASY, where=Here())
    contest = await execute(replace(plan, asks=("lossless", "chow:0.9")), told=told)
    passes = {name: _passes(contest[name].middle) for name in ("lossless", "chow:0.9")}
    share = passes["chow:0.9"] / passes["lossless"]
    case = "chow, easy items"
    says = "expert passes an answer over lossless"
    return Outcome(
        claims=(Claim(case=case, says=says, measured=share, most=0.2),),
        contests={case: (contest, "")},
    )


async def wire(scale: Scale, told: Told) -> Outcome:
    """Sampled drafts send a sparse row a token."""
    plan = _plan(scale, parameters=None, streams=1, where=Here())
    sampled = [body | {"temperature": 1, "seed": at} for at, body in enumerate(plan.bodies)]
    contest = await execute(replace(plan, bodies=sampled, asks=("lossless@5",)), told=told)
    found = contest["lossless@5"].middle
    size = (found.bytes_per_token or 0.0) * (found.tokens_per_round or 0.0)
    case = "wire, temperature 1"
    return Outcome(
        claims=(Claim(case=case, says="bytes a round", measured=size, most=1000),),
        contests={case: (contest, "")},
    )


async def router(scale: Scale, told: Told) -> Outcome:
    """Transport and loop alone, over tiers that answer at once."""
    found = await microbench.measure_router(streams=16, rounds=scale.router_rounds)
    told(f"router: {found.per_second:.0f} rounds/s")
    case = f"router, {scale.router_rounds} rounds"
    grown = found.grown_bytes / _MEBIBYTE
    return Outcome(
        claims=(
            Claim(case=case, says="rounds/s", measured=found.per_second, least=3000),
            Claim(case=case, says="memory grown, MiB", measured=grown, most=4),
        ),
        contests={},
    )


async def drafter_steps(scale: Scale, told: Told) -> Outcome:
    """One token of the drafter that ships."""
    tier = scale.settings.drafter
    found = microbench.measure_step(
        tier.model_path,
        sessions=(1, 16),
        policy=_GREEDY,
        settings=_engine(scale.settings, "drafter"),
    )
    told(f"drafter: {', '.join(f'{one.step_ms:.2f} ms' for one in found)}")
    case = "drafter's step, ms"
    return Outcome(
        claims=(
            Claim(case=case, says="one session", measured=found[0].step_ms, most=0.8),
            Claim(case=case, says="16 sessions", measured=found[1].step_ms, most=4),
        ),
        contests={},
    )


async def verification(scale: Scale, told: Told) -> Outcome:
    """Judging 16 sampled blocks over 32,000 tokens, beside a pass of 120M.

    Other samplings are told of, on rows so flat that hardly any token can be passed over.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WIDE_VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    dtype = getattr(torch, scale.settings.expert.engine.dtype, torch.float32)
    random: Any = LlamaForCausalLM(config)
    model = adopt(random.to(dtype), name="random 120M")
    settings = _engine(scale.settings, "expert")
    shares: list[float] = []
    for name, sampling in _JUDGED.items():
        rig = microbench.Rig(
            model,
            work=microbench.Work.JUDGE,
            policy=DecodingParams(sampling=sampling),
            settings=settings,
        )
        found = rig.time(sessions=16)
        told(f"expert, {name}: {found.head_ms:.2f} of {found.step_ms:.2f} ms")
        shares.append(found.head_share)
    case = "verification, 16 sessions, vocabulary 32k"
    says = "share of the expert's step"
    return Outcome(
        claims=(Claim(case=case, says=says, measured=shares[0], most=0.05),), contests={}
    )


Case: TypeAlias = "Callable[[Scale, Told], Coroutine[Any, Any, Outcome]]"

CASES: Mapping[str, Case] = {
    case.__name__: case
    for case in (
        one_stream, one_stream_float32, sixteen_streams, apart, draft_lengths, deferrals, wire,
        router, drafter_steps, verification,
    )
}  # fmt: skip


def _plan(
    scale: Scale,
    *,
    parameters: str | None,
    streams: int,
    levels: tuple[Level, ...] = _ALL,
    where: Where = _PROCESSES,
) -> Plan:
    settings = scale.settings
    if parameters is not None:
        settings = padded_expert(settings, parameters=parameters)
    # A closed loop is full for most of its time only if each stream has several requests.
    count = scale.questions * (streams // 2 if streams > 1 else 1)
    return Plan(
        settings=settings,
        bodies=questions(count=count, levels=levels),
        arrivals=Closed(concurrency=streams),
        rounds=scale.rounds,
        where=(where,),
    )


def _share_of_ideal(settings: Application, name: str) -> Gauge:
    """Return what measures passes alone, over blocks as long as a contender's, and their share."""
    rig = microbench.Rig(
        settings.expert.model_path,
        work=microbench.Work.JUDGE,
        policy=_GREEDY,
        settings=_engine(settings, "expert"),
    )

    def share(found: Mapping[str, Figures]) -> float:
        blocks = found[name].blocks
        passes_ms = [
            rounds
            * rig.time(
                sessions=1, context_tokens=_CONTEXT_TOKENS, block_tokens=length, passes=_PASSES
            ).mean_ms
            for length, rounds in blocks.items()
        ]
        return of_ideal(found[name], pass_ms=sum(passes_ms) / sum(blocks.values())) or 0.0

    return share


def _engine(settings: Application, tier: str) -> EngineSettings:
    chosen: dict[str, Any] = getattr(settings, tier).engine.model_dump()
    return EngineSettings(**chosen)


def _passes(found: Figures) -> float:
    """Return the expert's passes of an answer."""
    per_pass = found.tokens_per_expert_pass
    return 0.0 if per_pass is None else found.tokens / per_pass / found.requests


def _peer(contest: Contest) -> str:
    return next(one.name for one in contest.standings if one.name.startswith(_PEER))


def _padded(parameters: str) -> str:
    return f"The expert is cost-padded to {parameters} parameters; its text is its own."
