"""From a body that parses to requests that cannot be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from cascade.api.context import MAX_SEED
from cascade.api.prompts import check_ids, conversation, most_tokens, prompts
from cascade.api.schema import ChatBody, CompletionBody, Generated, Options, plain
from cascade.errors import ContextTooLong, InvalidRequest, ModelNotFound
from cascade.rules import Chow, ChowLog, Lossless, Lossy, Rule
from cascade.types import (
    Coupling,
    DecodingParams,
    Mode,
    Request,
    SamplingParams,
    SequenceCascadeParams,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.api.context import Defaults, ServingContext

_COMPLETION_TOKENS = 16

_GREEDY_BELOW = 1e-5  # logits over a smaller temperature leave float32

_TOKEN_CASCADE = Chow(alpha=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    """Which answers to generate, prompt by prompt, and what to say about them."""

    model: str
    requests: tuple[Request, ...]  # answer `i` belongs to prompt `i // n`
    n: int = 1
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # the caller's own, which it is told about
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Return each prompt once."""
        return tuple(request.prompt for request in self.requests[:: self.n])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What a body says about its answers, whichever kind it is."""

    body: Generated
    prompts: tuple[tuple[int, ...], ...]
    prompt_param: str
    max_tokens: int | None
    usual_tokens: int | None  # where `max_tokens` is absent; None: what the context leaves
    max_param: str
    logprobs: int | None
    options: Options = field(default_factory=Options)


def completion(body: CompletionBody, service: ServingContext) -> CompletionCall:
    """Return what a text completion asks for.

    Raises:
        InvalidRequest: It asks for what this server cannot give; `param` names the field.
        ModelNotFound: It names another server's model.
    """
    _check(body, service)
    wish = _Wish(
        body=body,
        prompts=prompts(body, service),
        prompt_param="prompt",
        max_tokens=body.max_tokens,
        usual_tokens=_COMPLETION_TOKENS,
        max_param="max_tokens",
        logprobs=body.logprobs,
        options=body.cascade or Options(),
    )
    return _call(wish, service, echo=bool(body.echo))


def chat(body: ChatBody, service: ServingContext) -> CompletionCall:
    """Return what a chat completion asks for; raises as `completion` does."""
    _check(body, service)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    wish = _Wish(
        body=body,
        prompts=(conversation(body.messages, service),),
        prompt_param="messages",
        max_tokens=_chat_tokens(body),
        usual_tokens=service.defaults.chat_tokens,
        max_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        options=body.cascade or Options(),
    )
    return _call(wish, service)


def _check(body: Generated, service: ServingContext) -> None:
    limits = service.limits
    if body.model is not None and body.model not in service.models:
        served = ", ".join(service.models)
        raise ModelNotFound(
            f"No model `{body.model}` here; this server has {served}", param="model"
        )
    if (body.n or 1) > limits.choices:
        raise InvalidRequest(
            f"`n` is {body.n}; this server allows 1 to {limits.choices}", param="n"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    _check_stops(_stops(body), service)
    check_ids(body.stop_token_ids or (), "stop_token_ids", service)
    check_ids(tuple(body.logit_bias or ()), "logit_bias", service)
    if len(body.logit_bias or ()) > limits.biased_tokens:
        raise InvalidRequest(
            f"`logit_bias` has {len(body.logit_bias or ())} tokens;"
            f" the most is {limits.biased_tokens}",
            param="logit_bias",
        )


def _check_stops(stops: Sequence[str], service: ServingContext) -> None:
    limits = service.limits
    if len(stops) > limits.stop_strings:
        raise InvalidRequest(
            f"`stop` has {len(stops)} strings; the most is {limits.stop_strings}", param="stop"
        )
    if any(len(stop) > limits.stop_characters for stop in stops):
        raise InvalidRequest(
            f"A string of `stop` is longer than {limits.stop_characters} characters", param="stop"
        )


def _call(wish: _Wish, service: ServingContext, *, echo: bool = False) -> CompletionCall:
    body = wish.body
    n = body.n or 1
    if n * len(wish.prompts) > service.limits.answers:
        raise InvalidRequest(
            f"`n` times the prompts is {n * len(wish.prompts)} answers;"
            f" this server gives {service.limits.answers} at once",
            param="n",
        )
    seed = service.draw_seed() if body.seed is None else body.seed
    seeds = [(seed + number) % MAX_SEED for number in range(n)]
    options = body.stream_options
    return CompletionCall(
        model=body.model or service.models[0],
        requests=tuple(
            _request(wish, service, prompt=prompt, seed=seed)
            for prompt in wish.prompts
            for seed in seeds
        ),
        n=n,
        stop_strings=_stops(body),
        stop_ids=tuple(body.stop_token_ids or ()),
        echo=echo,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
    )


def _request(
    wish: _Wish, service: ServingContext, *, prompt: tuple[int, ...], seed: int
) -> Request:
    options, defaults = wish.options, service.defaults
    mode = _mode(options, defaults)
    patience = options.patience
    return Request(
        prompt=prompt,
        policy=_policy(wish, service, mode=mode, seed=seed),
        mode=mode,
        max_tokens=_max_tokens(wish, service, prompt),
        draft_tokens=_draft_tokens(options, service),
        patience=defaults.patience
        if patience is None
        else SequenceCascadeParams(confidence=patience.confidence, threshold=patience.threshold),
        prediction=_prediction(wish.body, service),
        deadline_s=options.deadline_s or defaults.deadline_s,
        on_expert_loss=options.on_expert_loss or defaults.on_expert_loss,
        trace=options.trace,
    )


def _policy(wish: _Wish, service: ServingContext, *, mode: Mode, seed: int) -> DecodingParams:
    options, defaults = wish.options, service.defaults
    coupling = _coupling(wish.body, options, defaults)
    return DecodingParams(
        sampling=_sampling(wish.body, defaults),
        rule=_rule(options, defaults, mode),
        coupling=coupling,
        bonus=options.bonus or defaults.bonus,
        verification=_verification(options, defaults, coupling),
        rows=options.rows or defaults.rows,
        row_entries=defaults.row_entries,
        seed=seed,
        stop_ids=_stop_ids(wish.body, service),
        logprobs=wish.logprobs,
    )


def _sampling(body: Generated, defaults: Defaults) -> SamplingParams:
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
    return SamplingParams(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=top_k if top_p > 0 else 1,
        top_p=top_p if top_p > 0 else 1.0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((body.logit_bias or {}).items())),
    )


def _mode(options: Options, defaults: Defaults) -> Mode:
    """Return the mode; a request that brings its own rule and names no mode means a cascade."""
    if options.mode is not None:
        return options.mode
    return defaults.mode if options.rule is None else Mode.CASCADE


def _rule(options: Options, defaults: Defaults, mode: Mode) -> Rule:
    """Return the rule, where a mode has a choice of rules; `lossless` elsewhere."""
    rule = options.rule or defaults.rule
    match mode:
        case Mode.CASCADE:
            return rule
        case Mode.SPECULATIVE:
            return _rule_among(rule, options, mode, (Lossless, Lossy), Lossless())
        case Mode.TOKEN_CASCADE:
            return _rule_among(rule, options, mode, (Chow, ChowLog), _TOKEN_CASCADE)
        case Mode.EXPERT_ONLY | Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
            return _rule_among(rule, options, mode, (), Lossless())


def _rule_among(
    rule: Rule, options: Options, mode: Mode, kinds: tuple[type[Rule], ...], otherwise: Rule
) -> Rule:
    if isinstance(rule, kinds):
        return rule
    if options.rule is None:
        return otherwise
    names = (field.default for kind in kinds for field in fields(kind) if field.name == "kind")
    allowed = " or ".join(f"`{name}`" for name in names) or "no rule at all"
    raise InvalidRequest(
        f"`cascade.rule` is `{rule.kind}`, but mode `{mode}` takes {allowed}", param="cascade.rule"
    )


def _coupling(body: Generated, options: Options, defaults: Defaults) -> Coupling:
    if options.coupling is not None:
        return options.coupling
    if defaults.coupling is not None:
        return defaults.coupling
    return Coupling.MAXIMAL if body.seed is None else Coupling.GUMBEL


def _verification(options: Options, defaults: Defaults, coupling: Coupling) -> Verification:
    """Return how blocks are judged; under `gumbel` there is one way only."""
    if coupling is not Coupling.GUMBEL:
        return options.verification or defaults.verification
    if options.verification is Verification.BLOCK:
        raise InvalidRequest(
            "`cascade.verification` is `block`, which needs coupling `maximal`; this request has"
            " `gumbel`, the default where `seed` is set",
            param="cascade.verification",
        )
    return Verification.TOKEN


def _draft_tokens(options: Options, service: ServingContext) -> int | None:
    wanted, most = options.draft_tokens, service.limits.draft_tokens
    if wanted is None:
        return service.defaults.draft_tokens
    if wanted == "auto":
        return None
    if wanted > most:
        raise InvalidRequest(
            f"`cascade.draft_tokens` is {wanted}; this server allows 0 to {most}",
            param="cascade.draft_tokens",
        )
    return wanted


def _prediction(body: Generated, service: ServingContext) -> tuple[int, ...]:
    if body.prediction is None:
        return ()
    return tuple(service.tokenizer.encode(plain(body.prediction.content), add_special=False))


def _stops(body: Generated) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _stop_ids(body: Generated, service: ServingContext) -> tuple[int, ...]:
    ends = () if body.ignore_eos else (*service.tokenizer.stop_ids, *service.stop_ids)
    return tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))


def _max_tokens(wish: _Wish, service: ServingContext, prompt: tuple[int, ...]) -> int:
    """Return how long the answer may be; prompt and answer fit the context together."""
    limits, param, most = service.limits, wish.max_param, most_tokens(service)
    room = limits.context_tokens - len(prompt)
    if len(prompt) > most or (room < 1 and wish.max_tokens != 0):
        raise ContextTooLong(
            f"The prompt has {len(prompt)} tokens; this server takes {most} and an answer,"
            f" {limits.context_tokens} in all",
            param=wish.prompt_param,
        )
    if wish.max_tokens is None:
        return min(wish.usual_tokens or room, limits.max_tokens or room, room)
    if limits.max_tokens is not None and wish.max_tokens > limits.max_tokens:
        raise InvalidRequest(
            f"`{param}` is {wish.max_tokens}; this server allows {limits.max_tokens}", param=param
        )
    if wish.max_tokens > room:
        raise ContextTooLong(
            f"The prompt has {len(prompt)} tokens and `{param}` is {wish.max_tokens};"
            f" the context holds {limits.context_tokens} together",
            param=param,
        )
    return wish.max_tokens


def _chat_tokens(body: ChatBody) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"`max_tokens` is {old} and `max_completion_tokens` is {new}; send one",
            param="max_tokens",
        )
    return old if new is None else new
