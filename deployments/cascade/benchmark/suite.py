"""The suite: every speed that this server promises, measured by one command.

A case runs comparisons or microbenchmarks and checks what it measured against what is promised.
Experts of other sizes than the one that ships are synthetic models: they write the same text at the
cost of a larger model. Answers are greedy, to held-out items.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cascade.benchmark import fairness, microbench, synthetic_model, systems
from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.metrics import share_of_ideal
from cascade.benchmark.plan import (
    ANSWER_TOKENS,
    Plan,
    held_out_requests,
    parse_variant,
    run_plan,
    with_engine,
)
from cascade.benchmark.runner import compare
from cascade.benchmark.systems import Role
from cascade.engine.model_loader import adopt, load
from cascade.evaluation.tasks import Level
from cascade.rules import Diff, Lossless, Rule, TokenV3
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import DecodingParams, Grammar, GrammarKind, RowFormat, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from cascade.benchmark.metrics import RunMetrics
    from cascade.benchmark.runner import Comparison, RoundProbe
    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.tokenizer import Tokenizer
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]
Progress: TypeAlias = "Callable[[str], object]"

EASY, HARD = (Level.EASY,), (Level.HARD, Level.HARDEST)
_ALL_LEVELS = (*EASY, Level.MIDDLE, *HARD)
_GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
_CONTEXT_TOKENS = 64  # about the length of the sequence in the middle of an answer
_ORDER_VALUES: Json = {
    "customer_account_type": {"enum": ["private", "company"]},
    "delivery_address_confirmed": {"type": "boolean"},
    "preferred_payment_method": {"enum": ["invoice", "credit card", "cash"]},
    "number_of_ordered_articles": {"type": "integer", "minimum": 0, "maximum": 99},
    "newsletter_subscription_active": {"type": "boolean"},
    "shipping_priority_level": {"enum": ["standard", "express"]},
}
_ORDER: Json = {
    "type": "object",
    "properties": _ORDER_VALUES,
    "required": list(_ORDER_VALUES),
    "additionalProperties": False,
}
_SHORT_REQUESTS = 100  # of the small caller, in each half of a round
_PASSES = 4  # of the expert alone over blocks of each length, after each round
_TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
# Rule, sampling and rows, and the most bytes of a drafted token at each temperature; two bytes for
# each of the 3,193 tokens of the pair that ships are the most that a distribution takes.
_DRAFTS: dict[str, tuple[Rule, Json, RowFormat, tuple[int, ...]]] = {
    "lossless": (Lossless(), {}, RowFormat.AUTO, (20, 100, 200, 450)),
    "token_v3": (TokenV3(alpha=0.9), {}, RowFormat.AUTO, (20, 20, 20, 20)),
    "diff": (Diff(alpha=0.0), {}, RowFormat.AUTO, (50, 1000, 5000, 6500)),
    "diff, sparse": (Diff(alpha=0.0), {}, RowFormat.SPARSE, (50, 100, 150, 450)),
    "diff, top_p 0.95": (Diff(alpha=0.0), {"top_p": 0.95}, RowFormat.AUTO, (50, 100, 150, 3000)),
    "diff, full": (Diff(alpha=0.0), {}, RowFormat.FULL, (50, 6500, 6500, 6500)),
}
_VERIFIED_SAMPLINGS = {
    "sampled": SamplingParams(),
    "top-p 0.95": SamplingParams(top_p=0.95),
    "top-k 50": SamplingParams(top_k=50),
    "repetition penalty 1.1": SamplingParams(repetition_penalty=1.1),
}


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
        """Whether the measurement is within the bounds."""
        return (self.least is None or self.measured >= self.least) and (
            self.most is None or self.measured <= self.most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What a case measured; comparisons by title, each with a note for the reader."""

    claims: tuple[Claim, ...]
    comparisons: Mapping[str, tuple[Comparison, str]] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """How long the suite may take."""

    settings: Application  # the pair that ships, with its threads
    rounds: int = 3
    questions: int = 2  # of each family, for one stream; several streams have more
    router_rounds: int = 100_000
    llama_server: str = ""  # the path of a binary; xllamacpp's server if empty


class Speedup(NamedTuple):
    """A promise of a ratio of tokens per second."""

    says: str  # may name `{over}`
    system: str
    over: str  # a role or a pattern of names; the fastest system that matches
    least: float | str  # or what an earlier promise says, whose measurement is the bound


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedupCase:
    """A comparison over an expert of `parameters`, and its promises."""

    title: str
    parameters: str
    streams: int
    plan: Json  # further fields of the `Plan`
    speedups: tuple[Speedup, ...]
    levels: tuple[Level, ...] = _ALL_LEVELS
    rounds_factor: int = 1
    dtype: str | None = None  # of the expert, if not that of the settings
    ideal_of: str | None = None  # the system whose rounds are compared with ideal rounds


_VARIANTS = ("expert_only", "lossless", "token_v3:0.99")

_ONE_STREAM = SpeedupCase(
    title="one stream, 500M",
    parameters="500M",
    streams=1,
    plan={
        "variants": ("expert_only", "lossless", "token_v3:0.9", "token_v3:0.99"),
        "baselines": ("assisted", "batched", "llama-server"),
    },
    ideal_of="lossless, apart",
    speedups=(
        Speedup("expert_only over {over}", "expert_only, apart", "llama.cpp, expert alone", 0.9),
        Speedup(
            "lossless over the expert alone ({over})", "lossless, apart", Role.EXPERT_ALONE, 2.5
        ),
        Speedup(
            "token_v3 over the expert alone ({over})", "token_v3:0.9, apart", Role.EXPERT_ALONE,
            "lossless over the expert alone ({over})",
        ),
        Speedup("lossless over {over}", "lossless, apart", Role.LLAMA_DRAFTED, 1.2),
        Speedup("lossless over {over}", "lossless, apart", "transformers assisted*", 1.25),
    ),
)  # fmt: skip

# What an expert on a CPU has if its settings name no dtype.
_FLOAT32 = replace(_ONE_STREAM, title="one stream, 500M, float32", dtype="float32")

_SIXTEEN_STREAMS = SpeedupCase(
    title="16 streams, 120M",
    parameters="120M",
    streams=16,
    plan={
        "variants": _VARIANTS,
        "baselines": ("assisted", "batched", "continuous", "llama-server"),
    },
    speedups=(
        Speedup("expert_only over {over}", "expert_only, apart", "llama.cpp, expert alone", 1.1),
        Speedup("lossless over {over}", "lossless, apart", Role.LLAMA_DRAFTED, 1.3),
        Speedup("lossless over {over}", "lossless, apart", "transformers assisted*", 4),
        Speedup("lossless over {over}", "lossless, apart", "transformers [bc]*", 1.3),
    ),
)

_LLAMA_CPP = tuple(
    SpeedupCase(
        title=f"llama.cpp, {streams} streams, 120M",
        parameters="120M",
        streams=streams,
        plan={"variants": _VARIANTS, "baselines": ("llama-server",)},
        speedups=(Speedup("lossless over {over}", "lossless, apart", Role.LLAMA_DRAFTED, least),),
    )
    for streams, least in ((1, 1.0), (4, 1.1), (64, 1.8))
)

_THREE_PROCESSES = SpeedupCase(
    title="three processes, one stream, 500M",
    parameters="500M",
    streams=1,
    plan={
        "deployments": (systems.one_process_without_grpc, systems.separate_processes),
        "rtts_ms": (0.0, 5.0, 20.0),
    },
    speedups=(
        Speedup("three processes over one", "lossless, apart", "lossless, one process", 0.93),
        Speedup("5 ms of round trip over none", "lossless, apart, 5 ms", "lossless, apart", 0.9),
        Speedup(
            "20 ms, over the expert alone", "lossless, apart, 20 ms", "expert_only, apart, 20 ms", 1
        ),
    ),
)

_DRAFT_LENGTHS = tuple(
    SpeedupCase(
        title=f"auto, {kind}, {streams} streams, {rtt_ms:g} ms",
        parameters="120M",
        streams=streams,
        levels=levels,
        rounds_factor=2 if streams == 1 else 1,  # rounds of one stream are short
        plan={
            "variants": tuple(f"lossless@{length}" for length in ("auto", 0, 1, 2, 3, 5, 8)),
            "rtts_ms": (rtt_ms,),
        },
        speedups=(
            Speedup(
                "auto over the best, {over}", f"lossless@auto{tail}", f"lossless@[0-9]{tail}", 0.95
            ),
            Speedup("auto over no drafts", f"lossless@auto{tail}", f"lossless@0{tail}", 0.97),
        ),
    )
    for (kind, levels), streams, (rtt_ms, tail) in itertools.product(
        (("easy", EASY), ("hard", HARD)), (1, 16), ((0.0, ", apart"), (10.0, ", apart, 10 ms"))
    )
)


async def measure_speedups(
    options: SuiteOptions, progress: Progress, *, cases: Sequence[SpeedupCase]
) -> CaseResult:
    """Run comparisons and check their speedups.

    Args:
        options: How long each may take.
        progress: Called with a line after each run.
        cases: The comparisons.
    """
    claims: list[Claim] = []
    comparisons: dict[str, tuple[Comparison, str]] = {}
    for case in cases:
        settings = options.settings
        if case.dtype is not None:
            settings = with_engine(settings, "expert", dtype=case.dtype)
        settings = synthetic_model.with_synthetic_expert(settings, parameters=case.parameters)
        plan = _plan(replace(options, settings=settings), streams=case.streams, levels=case.levels)
        plan = replace(plan, rounds=case.rounds_factor * plan.rounds, **case.plan)
        if options.llama_server:
            path = f"llama-server={options.llama_server}"
            baselines = [path if one == "llama-server" else one for one in plan.baselines]
            plan = replace(plan, baselines=baselines)
        if case.ideal_of is not None:
            bodies = [body | {"cascade": {"trace": True}} for body in plan.bodies]
            plan = replace(plan, bodies=bodies, probe=_ideal_probe(settings, case.ideal_of))
        comparison = await run_plan(plan, progress=progress)
        claim = partial(Claim, case=case.title)
        if case.ideal_of is not None:
            share = median(comparison.probed)
            claims.append(claim(says="share of the ideal, lossless", measured=share, least=0.9))
        measured: dict[str, float] = {}
        for says, system, over, least in case.speedups:
            speeds = {
                name: result.median.tokens_per_s
                for name, result in comparison.systems.items()
                if result.role == over or fnmatchcase(name, over)
            }
            fastest = max(speeds, key=speeds.__getitem__)
            measured[says] = comparison.ratio(system, fastest).median
            bound = measured[least] if isinstance(least, str) else least
            text = says.format(over=fastest.partition(", apart")[0])
            claims.append(claim(says=text, measured=measured[says], least=bound))
        comparisons[case.title] = (comparison, synthetic_model.provenance_note(case.parameters))
    return CaseResult(claims=tuple(claims), comparisons=comparisons)


async def deferrals(options: SuiteOptions, progress: Progress) -> CaseResult:
    """A rule that reads only the drafter's distribution calls the expert only where it defers."""
    plan = _plan(options, streams=1, levels=EASY)
    plan = replace(plan, deployments=(systems.one_process,), variants=("lossless", "chow:0.9"))
    comparison = await run_plan(plan, progress=progress)
    lossless, chow = (_passes_per_answer(comparison.systems[name].median) for name in plan.variants)
    claim = Claim(
        case="chow, easy items",
        says="expert passes an answer over lossless",
        measured=chow / lossless,
        most=0.2,
    )
    return CaseResult(claims=(claim,), comparisons={claim.case: (comparison, "")})


async def wire(options: SuiteOptions, progress: Progress) -> CaseResult:
    """Sampled drafts send a distribution per token: a small one under lossless, else most of it."""
    plan = replace(_plan(options, streams=1), deployments=(systems.one_process,))
    sampled = [body | {"temperature": 1, "seed": seed} for seed, body in enumerate(plan.bodies)]
    plan = replace(plan, bodies=sampled, variants=("lossless@5",))
    comparison = await run_plan(plan, progress=progress)
    found = comparison.systems["lossless@5"].median
    claim = Claim(
        case="wire, temperature 1",
        says="bytes a round",
        measured=(found.bytes_per_token or 0.0) * (found.tokens_per_round or 0.0),
        most=1000,
    )
    drafter = options.settings.drafter
    model = load(drafter.model_path, device="cpu", dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(drafter.model_path)
    prompts = [
        tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        for body in plan.bodies
    ]
    logits = microbench.greedy_logits(model, prompts)
    sizes: list[Claim] = []
    for name, (rule, options_of, rows, most) in _DRAFTS.items():
        for temperature, at_most in zip(_TEMPERATURES, most, strict=True):
            sampling = SamplingParams(temperature=temperature, **options_of)
            policy = DecodingParams(rule=rule, sampling=sampling, rows=rows)
            sizes.append(
                Claim(
                    case="wire, bytes of a drafted token",
                    says=f"{name}, temperature {temperature:g}",
                    measured=microbench.draft_bytes(logits, policy=policy),
                    most=at_most,
                )
            )
            progress(f"wire: {sizes[-1].measured:.0f} bytes, {sizes[-1].says}")
    return CaseResult(claims=(claim, *sizes), comparisons={claim.case: (comparison, "")})


async def grammars(options: SuiteOptions, progress: Progress) -> CaseResult:
    """Answers to a schema of long names and short values, compared with as many tokens of text."""
    case, form = "grammars, 120M", {"name": "order", "schema": _ORDER, "strict": True}
    settings = synthetic_model.with_synthetic_expert(options.settings, parameters="120M")
    fields = {
        "text": {"min_tokens": ANSWER_TOKENS},
        "schema": {"response_format": {"type": "json_schema", "json_schema": form}},
    }
    async with systems.separate_processes(settings, (0.0,)) as [base]:
        comparison = await compare(
            [
                replace(base, name=name, options=parse_variant("lossless"), fields=own)
                for name, own in fields.items()
            ],
            held_out_requests(count=options.questions, levels=_ALL_LEVELS),
            ClosedLoop(),
            rounds=options.rounds,
            progress=progress,
        )
    speedup = comparison.ratio("schema", "text").median
    claim = Claim(case=case, says="a schema over text", measured=speedup, least=1.3)
    return CaseResult(
        claims=(claim,),
        comparisons={case: (comparison, synthetic_model.provenance_note("120M"))},
    )


async def router(options: SuiteOptions, progress: Progress) -> CaseResult:
    """The router's loop and gRPC alone, over tiers that answer at once."""
    found = await microbench.measure_router(streams=16, rounds=options.router_rounds)
    progress(f"router: {found.per_second:.0f} rounds/s")
    claim = partial(Claim, case=f"router, {options.router_rounds} rounds")
    grown_mib = found.grown_bytes / 2**20
    return CaseResult(
        claims=(
            claim(says="rounds/s", measured=found.per_second, least=3000),
            claim(says="memory grown, MiB", measured=grown_mib, most=4),
        )
    )


async def drafter_steps(options: SuiteOptions, progress: Progress) -> CaseResult:
    """One token of the drafter that ships."""
    bench = microbench.StepBenchmark(
        options.settings.drafter.model_path,
        policy=_GREEDY,
        settings=options.settings.drafter.options().engine,
    )
    one_ms, many_ms = (bench.time(sessions=sessions).step_ms for sessions in (1, 16))
    progress(f"drafter: {one_ms:.2f} ms, {many_ms:.2f} ms")
    claim = partial(Claim, case="drafter's step, ms")
    return CaseResult(
        claims=(
            claim(says="one session", measured=one_ms, most=0.8),
            claim(says="16 sessions", measured=many_ms, most=4),
        )
    )


async def masks(options: SuiteOptions, progress: Progress) -> CaseResult:
    """The masks of 16 blocks of answers to a schema, over 128,000 tokens, compared with a pass.

    The tokens are those of the pair that ships and pairs of them.
    """
    tokens = _many_tokens(options.settings.pair().tokenizer, count=128_000)
    schema = {"type": "array", "items": _ORDER, "minItems": 16}
    text = microbench.GrammarText.random(
        GrammarCompiler(tokens),
        Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)),
        length=512,
    )
    found = microbench.StepBenchmark(
        _untrained_120m(options, vocabulary=len(tokens.texts)),
        settings=options.settings.expert.options().engine,
        text=text,
    ).time(sessions=16, block_tokens=4)
    progress(f"expert: masks take {found.mask_ms:.2f} of {found.step_ms:.2f} ms")
    claim = Claim(
        case="masks, 16 sessions, vocabulary 128k",
        says="share of the expert's step",
        measured=found.mask_share,
        most=0.05,
    )
    return CaseResult(claims=(claim,))


def _many_tokens(tokenizer: Tokenizer, *, count: int) -> TokenTexts:
    """Return a vocabulary: the tokens of a tokenizer, and pairs of those."""
    own = TokenTexts.of(tokenizer, tokenizer.size)
    words = [text for text in own.texts if text]
    pairs = (one + other for one, other in itertools.product(words, repeat=2))
    texts = dict.fromkeys(itertools.islice(pairs, 2 * count))
    for text in own.texts:
        texts.pop(text, None)
    return replace(own, texts=(*own.texts, *itertools.islice(texts, count - len(own.texts))))


async def verification(options: SuiteOptions, progress: Progress) -> CaseResult:
    """Verifying 16 sampled blocks over 32,000 tokens, compared with a forward pass of 120M.

    The other sampling parameters are only reported: the distributions of a random model are so flat
    that hardly any token can be skipped.
    """
    model = _untrained_120m(options, vocabulary=32_000)
    shares: list[float] = []
    for name, sampling in _VERIFIED_SAMPLINGS.items():
        found = microbench.StepBenchmark(
            model,
            policy=DecodingParams(sampling=sampling),
            settings=options.settings.expert.options().engine,
        ).time(sessions=16, block_tokens=5)
        progress(f"expert, {name}: {found.handler_ms:.2f} of {found.step_ms:.2f} ms")
        shares.append(found.handler_share)
    claim = Claim(
        case="verification, 16 sessions, vocabulary 32k",
        says="share of the expert's step",
        measured=shares[0],
        most=0.05,
    )
    return CaseResult(claims=(claim,))


async def callers(options: SuiteOptions, progress: Progress) -> CaseResult:
    """A caller with short prompts, alone and beside one with many long ones, on shared tiers."""
    found = await fairness.measure(
        options.settings, rounds=options.rounds, requests=_SHORT_REQUESTS, progress=progress
    )
    ratios = sorted(one.ratio for one in found)
    claim = Claim(
        case=f"a caller beside one with n = {fairness.LONG_PROMPTS} long prompts",
        says=f"p95 of its time to the first token, times that alone ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f} over {len(ratios)} rounds)",
        measured=median(ratios),
        most=2.0,
    )
    return CaseResult(claims=(claim,))


def _untrained_120m(options: SuiteOptions, *, vocabulary: int) -> LoadedModel:
    """Return a model of 120M parameters if it has 32,000 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    dtype = getattr(torch, options.settings.expert.engine.dtype, torch.float32)
    untrained: Any = LlamaForCausalLM(config)
    return adopt(untrained.to(dtype))


CASES: Mapping[str, Callable[[SuiteOptions, Progress], Coroutine[Any, Any, CaseResult]]] = {
    "one_stream": partial(measure_speedups, cases=(_ONE_STREAM,)),
    "one_stream_float32": partial(measure_speedups, cases=(_FLOAT32,)),
    "sixteen_streams": partial(measure_speedups, cases=(_SIXTEEN_STREAMS,)),
    "llama_cpp": partial(measure_speedups, cases=_LLAMA_CPP),
    "apart": partial(measure_speedups, cases=(_THREE_PROCESSES,)),
    "draft_lengths": partial(measure_speedups, cases=_DRAFT_LENGTHS),
    "deferrals": deferrals,
    "grammars": grammars,
    "wire": wire,
    "router": router,
    "drafter_steps": drafter_steps,
    "verification": verification,
    "masks": masks,
    "fairness": callers,
}


def _plan(options: SuiteOptions, *, streams: int, levels: Sequence[Level] = _ALL_LEVELS) -> Plan:
    # A closed loop is full for most of its time only if each stream has several requests.
    count = options.questions * (streams // 2 if streams > 1 else 1)
    return Plan(
        settings=options.settings,
        bodies=held_out_requests(count=count, levels=levels),
        load=ClosedLoop(concurrency=streams),
        rounds=options.rounds,
        deployments=(systems.separate_processes,),
    )


def _ideal_probe(settings: Application, name: str) -> RoundProbe:
    """Return a probe of a system's share of the ideal.

    It times forward passes alone over blocks as long as those that the system verified.
    """
    bench = microbench.StepBenchmark(
        settings.expert.model_path,
        policy=_GREEDY,
        settings=settings.expert.options().engine,
    )

    def share(found: Mapping[str, RunMetrics]) -> float:
        blocks = found[name].blocks
        passes_ms = sum(
            rounds
            * bench.time(
                sessions=1, context_tokens=_CONTEXT_TOKENS, block_tokens=length, passes=_PASSES
            ).mean_ms
            for length, rounds in blocks.items()
        )
        return share_of_ideal(found[name], pass_ms=passes_ms / sum(blocks.values())) or 0.0

    return share


def _passes_per_answer(found: RunMetrics) -> float:
    per_pass = found.tokens_per_expert_pass
    return 0.0 if per_pass is None else found.tokens / per_pass / found.requests
