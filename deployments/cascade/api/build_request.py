"""Turns a parsed body into generation requests: fills in defaults, checks limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cascade.api.context import MAX_SEED
from cascade.api.output_processor import TextOptions
from cascade.api.phases import phase_rules
from cascade.api.prompts import (
    check_at_most,
    check_ids,
    check_model,
    conversation,
    max_prompt_tokens,
    naming,
    prompts,
    tokenize,
    too_long,
)
from cascade.api.schema import ChatBody, CompletionBody, Generated, Options, plain
from cascade.api.structured import after_thoughts, element_of, given_grammar
from cascade.api.text_drafts import check_text_drafts
from cascade.api.tool_grammar import tool_grammar
from cascade.api.tools import ChatReading, chat_reading, tool_choice
from cascade.errors import ContextTooLong, InvalidRequest
from cascade.speculation.modes import RULES
from cascade.types import (
    Coupling,
    DecodingParams,
    ExpertLoss,
    Mode,
    Request,
    SamplingParams,
    TokenConstraints,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.api.context import Defaults, ServingContext
    from cascade.rules import Rule

_GREEDY_BELOW = 1e-5  # logits divided by less overflow float32
_UNCHANGED = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    """Which completions to generate, prompt by prompt, and what the response shows of them."""

    model: str
    requests: tuple[Request, ...]  # request `i` belongs to prompt `i // n`
    n: int = 1
    text: TextOptions = field(default_factory=TextOptions)
    stop_ids: tuple[int, ...] = ()  # the caller's own, which `stop_reason` shows
    echo: tuple[tuple[str, ...], ...] = ()  # the text of each prompt's tokens, to begin with
    prompt_logprobs: int | None = None  # alternatives for each token of the prompt
    grammar_param: str = ""  # the field that says what the completions must match
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    reading: ChatReading | None = None  # splits answers into thoughts, content and tool calls

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Return each prompt once."""
        return tuple(request.client_prompt for request in self.requests[:: self.n])


def completion(body: CompletionBody, service: ServingContext) -> CompletionCall:
    """Return what a text completion requests.

    Raises:
        InvalidRequest: This server cannot do it; `param` names the field.
        ModelNotFound: It names a model that is not served.
    """
    _check(body, service)
    service = _bounded(body, service)
    length = partial(_max_tokens, service, body.max_tokens, default=service.completion_tokens)
    given, keep = prompts(body, service), _kept_tokens(body, service, body.max_tokens)
    tokens = [tokenize(prompt, service, keep=keep) for prompt in given]
    lengths = [(prompt, length(prompt=prompt)) for prompt in tokens]
    echo: tuple[tuple[str, ...], ...] = ()
    if body.echo:
        whole = map(service.tokenizer.pieces, given)
        echo = tuple(texts[-len(kept) :] for texts, kept in zip(whole, tokens, strict=True))
    call = _call(body, service, lengths, logprobs=body.logprobs, echo=echo)
    call = _with_policy(call, phases=phase_rules(body, service, call.requests[0]))
    _check_drafts(call, service)
    return call


def chat(body: ChatBody, service: ServingContext) -> CompletionCall:
    """Return what a chat completion requests; raises as `completion` does."""
    _check(body, service)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"`max_tokens` is {old} and `max_completion_tokens` is {new}; send one",
            param="max_tokens",
        )
    service = _bounded(body, service)
    requested = old if new is None else new
    choice, keep = tool_choice(body, service), _kept_tokens(body, service, requested)
    prompt = conversation(body.messages, body, service, keep=keep, tools=choice.shown)
    length = _max_tokens(
        service,
        requested,
        prompt=prompt,
        default=service.defaults.chat_tokens,
        params=("messages", "max_tokens" if new is None else "max_completion_tokens"),
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    call = _call(body, service, [(prompt, length)], logprobs=logprobs)
    reading = chat_reading(choice, prompt, service)
    start = None if reading is None else reading.reader().region
    call = _with_policy(call, phases=phase_rules(body, service, call.requests[0], start=start))
    _check_drafts(call, service)
    if reading is None:
        return call
    given, param = call.requests[0].policy.grammar, call.grammar_param
    grammar = tool_grammar(choice, reading.form, start=start, given=given)
    if grammar is not None:
        # A `response_format` is that of an answer without calls.
        may_call = given is not None and not choice.must_call and element_of(given) is not None
        if given is not None and not may_call and not param.startswith("response_format"):
            raise InvalidRequest(
                f"`{param}` and `tools` that must be called cannot hold at once; leave out one",
                param=param,
            )
        most = service.limits.grammar_characters
        check_at_most(len(grammar.text), most, "tools", "characters of grammar")
        param = param if may_call else "tools"
        call = replace(_with_policy(call, grammar=grammar), grammar_param=param)
    elif given is not None:
        call = _with_policy(call, grammar=after_thoughts(given, reading.form, start=start))
    return replace(call, reading=reading, text=replace(call.text, visible=reading.form.visible))


def _with_policy(call: CompletionCall, **changes: Any) -> CompletionCall:
    """Return the call with other decoding parameters; what is None stays as it is."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return call
    requests = (replace(one, policy=replace(one.policy, **changes)) for one in call.requests)
    return replace(call, requests=tuple(requests))


def _check(body: Generated, service: ServingContext) -> None:
    limits = service.limits
    check_model(body.model, service)
    check_at_most(body.n or 1, limits.choices, "n")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    stops = _stop_strings(body)
    check_at_most(len(stops), limits.stop_strings, "stop", "strings")
    longest = max(map(len, stops), default=0)
    check_at_most(longest, limits.stop_characters, "stop", "characters in one string")
    check_ids(body.stop_token_ids or (), "stop_token_ids", service)
    check_ids(body.allowed_token_ids or (), "allowed_token_ids", service)
    words = body.bad_words or ()
    check_at_most(len(words), limits.bad_words, "bad_words", "words")
    longest = max(map(len, words), default=0)
    check_at_most(longest, limits.stop_characters, "bad_words", "characters in one word")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest(
            "`prompt_logprobs` come with the whole completion; leave out `stream: true`",
            param="prompt_logprobs",
        )
    if service.start_ids:
        _check_no_continuation(body)
    biased = tuple(body.logit_bias or ())
    check_ids(biased, "logit_bias", service)
    check_at_most(len(biased), limits.biased_tokens, "logit_bias", "tokens")


def _check_no_continuation(body: Generated) -> None:
    """Check that nothing is wanted of the prompt that only a model that continues it has."""
    echo = isinstance(body, CompletionBody) and body.echo
    wanted = {"echo": echo, "prompt_logprobs": body.prompt_logprobs is not None}
    if param := next((name for name, value in wanted.items() if value), None):
        raise InvalidRequest(
            f"`{param}` is not possible here: the model is an encoder-decoder, which reads a prompt"
            " and does not continue it; leave it out",
            param=param,
        )


def _bounded(body: Generated, service: ServingContext) -> ServingContext:
    """Return the service with the context of the tiers that the request needs."""
    options, defaults = body.cascade or Options(), service.defaults
    loss = options.on_drafter_loss or defaults.on_drafter_loss
    return service.bounded(_mode(options, defaults), loss)


def _kept_tokens(body: Generated, service: ServingContext, requested: int | None) -> int | None:
    """Return how many tokens at the end of a prompt are kept; None: it is not truncated.

    Args:
        body: The body.
        service: Has the limits.
        requested: Tokens of the completion.
    """
    count = body.truncate_prompt_tokens
    if count is None:
        return None
    if count == 0:
        raise InvalidRequest(
            "`truncate_prompt_tokens` is 0; give at least 1, or -1 for what fits",
            param="truncate_prompt_tokens",
        )
    most = max_prompt_tokens(service)
    if count < 0:
        left = most if service.start_ids else service.limits.context_tokens - (requested or 1)
        return max(1, min(most, left))
    check_at_most(count, most, "truncate_prompt_tokens")
    return count


def _max_tokens(
    service: ServingContext,
    requested: int | None,
    *,
    prompt: tuple[int, ...],
    default: int | None,
    params: tuple[str, str] = ("prompt", "max_tokens"),
) -> int:
    """Return how long the completion may be; prompt and completion share the context.

    The prompt of an encoder-decoder takes nothing of it. `default` applies if no length is
    requested; None: what the context leaves. `params` are the fields of prompt and length.
    """
    prompt_param, param = params
    limits, context = service.limits, service.limits.context_tokens
    begun = service.start_ids or prompt
    left = context - len(begun)
    if len(prompt) > max_prompt_tokens(service) or (left < 1 and requested != 0):
        what = f"the `{prompt_param}` has {len(prompt)}"
        what += "" if service.start_ids else ", and the completion needs one at least"
        raise too_long(what, service, param=prompt_param)
    if requested is None:
        return min(default or left, limits.max_tokens or left, left)
    if limits.clamp_max_tokens:
        return min(requested, limits.max_tokens or requested, left)
    if limits.max_tokens is not None:
        check_at_most(requested, limits.max_tokens, param)
    if requested > left:
        raise ContextTooLong(
            f"This model's maximum context length is {context} tokens. However, you requested"
            f" {len(prompt) + requested} tokens ({len(prompt)} in the `{prompt_param}`, {requested}"
            f" in the completion). Reduce the length of the `{prompt_param}` or `{param}`"
            if not service.start_ids
            else f"This model writes at most {left} tokens. However, you requested {requested}"
            f" tokens. Reduce `{param}`",
            param=param,
        )
    return requested


def _check_drafts(call: CompletionCall, service: ServingContext) -> None:
    if service.text_drafts:
        check_text_drafts(call.requests[0])


def _call(
    body: Generated,
    service: ServingContext,
    lengths: Sequence[tuple[tuple[int, ...], int]],
    *,
    logprobs: int | None,
    echo: tuple[tuple[str, ...], ...] = (),
) -> CompletionCall:
    """Return the call; `lengths` are the prompts, each with the most tokens of a completion."""
    n = body.n or 1
    if n * len(lengths) > service.limits.answers:
        raise InvalidRequest(
            f"`n` times the number of prompts is {n * len(lengths)}; one call may ask this server"
            f" for at most {service.limits.answers} answers: send several calls",
            param="n" if n > 1 else "prompt",
        )
    shortest = min(max_tokens for _, max_tokens in lengths)
    if (body.min_tokens or 0) > shortest:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens}, but a completion has at most {shortest} tokens"
            " here; ask for fewer, or for a larger maximum",
            param="min_tokens",
        )
    seed = service.draw_seed() if body.seed is None else body.seed
    given = given_grammar(body, service)
    common = _request(body, service, logprobs=logprobs)
    if given is not None:
        common = replace(common, policy=replace(common.policy, grammar=given.grammar))
    policies = [replace(common.policy, seed=(seed + number) % MAX_SEED) for number in range(n)]
    options = body.stream_options
    return CompletionCall(
        model=body.model or service.models[0],
        requests=tuple(
            replace(
                common,
                prompt=service.start_ids or prompt,
                source=prompt if service.start_ids else (),
                max_tokens=max_tokens,
                policy=policy,
            )
            for prompt, max_tokens in lengths
            for policy in policies
        ),
        n=n,
        text=TextOptions(
            stops=_stop_strings(body),
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
            skip_special=body.skip_special_tokens is not False,
            special_spaces=body.spaces_between_special_tokens is not False,
        ),
        stop_ids=tuple(body.stop_token_ids or ()),
        prompt_logprobs=body.prompt_logprobs,
        grammar_param="" if given is None else given.param,
        echo=echo,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
    )


def _request(body: Generated, service: ServingContext, *, logprobs: int | None) -> Request:
    """Return the request without its prompt, length and seed."""
    options, defaults = body.cascade or Options(), service.defaults
    mode = _mode(options, defaults)
    # Only under `gumbel` coupling does a seed fix the text whatever the drafter proposes.
    seeded = Coupling.MAXIMAL if body.seed is None else Coupling.GUMBEL
    coupling = options.coupling or defaults.coupling or seeded
    ends = () if body.ignore_eos else (*service.tokenizer.stop_ids, *service.stop_ids)
    patience, prediction = defaults.patience, ()
    if options.patience is not None:
        given = options.patience.model_dump(exclude_unset=True, exclude_none=True)
        patience = replace(patience, **given)
    if body.prediction is not None:
        text = plain(body.prediction.content)
        with naming("prediction"):
            prediction = service.tokenizer.encode_continuation(text)
    stop_ids = tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))
    policy = DecodingParams(
        sampling=_sampling(body, service),
        constraints=_constraints(body, service, stop_ids),
        rule=_rule(options, defaults, mode),
        coupling=coupling,
        bonus=options.bonus or defaults.bonus,
        verification=_verification(options, defaults, coupling),
        rows=options.rows or defaults.rows,
        row_entries=min(defaults.row_entries, service.tokenizer.vocabulary),
        stop_ids=stop_ids,
        logprobs=logprobs,
        divergence_budget=_divergence_budget(options, service, mode),
    )
    return Request(
        prompt=(),
        policy=policy,
        mode=mode,
        draft_tokens=_draft_tokens(options, service),
        patience=patience,
        prediction=prediction,
        deadline_s=options.deadline_s or defaults.deadline_s,
        on_expert_loss=options.on_expert_loss or defaults.on_expert_loss,
        on_drafter_loss=options.on_drafter_loss or defaults.on_drafter_loss,
        trace=bool(options.trace),
    )


def _mode(options: Options, defaults: Defaults) -> Mode:
    """Return the mode; a request that has its own rules and names no mode means a cascade."""
    has_rule = options.rule is not None or options.phases is not None
    return options.mode or (Mode.CASCADE if has_rule else defaults.mode)


def _divergence_budget(options: Options, service: ServingContext, mode: Mode) -> float | None:
    """Return the most divergence of an answer; None: any.

    Raises:
        InvalidRequest: It is more than allowed, or the request has parts that it cannot hold for.
    """
    given, most = options.divergence_budget, service.limits.divergence_budget
    if most is not None:
        check_at_most(given or 0.0, most, "cascade.divergence_budget")
    verified = mode in {Mode.CASCADE, Mode.SPECULATIVE, Mode.EXPERT_ONLY}
    default = service.defaults.divergence_budget if verified else None
    budget = next((one for one in (given, default, most) if one is not None), None)
    if budget is None:
        return None
    whose = "this server has" if given is None else "the request has"
    if not verified:
        raise InvalidRequest(
            f"{whose} a divergence budget, which needs an expert that verifies every token; mode"
            f" {mode} has none: use cascade or speculative",
            param="cascade.mode",
        )
    if (options.on_expert_loss or service.defaults.on_expert_loss) is ExpertLoss.DRAFTER:
        raise InvalidRequest(
            f"{whose} a divergence budget, which cannot hold if the drafter finishes the answer;"
            " send `on_expert_loss`: `fail`",
            param="cascade.on_expert_loss",
        )
    return budget if most is None else min(budget, most)


def _sampling(body: Generated, service: ServingContext) -> SamplingParams:
    def value(name: str) -> Any:
        """Return a field of the request, of the defaults, or what changes nothing."""
        found = getattr(body, name)
        found = getattr(service.defaults, name) if found is None else found
        return getattr(_UNCHANGED, name) if found is None else found

    temperature, top_p, top_k = value("temperature"), value("top_p"), max(value("top_k"), 0)
    if top_k >= service.tokenizer.vocabulary:
        top_k = 0  # all tokens, whatever the number
    return SamplingParams(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=top_k if top_p > 0 else 1,
        top_p=top_p if top_p > 0 else 1.0,
        min_p=value("min_p"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((body.logit_bias or {}).items())),
    )


def _constraints(
    body: Generated, service: ServingContext, stop_ids: tuple[int, ...]
) -> TokenConstraints:
    """Return which tokens a completion may have.

    Args:
        body: The body.
        service: Has the words that no completion may have.
        stop_ids: What ends a completion.

    Raises:
        InvalidRequest: A word has no tokens, or no token may begin a completion.
    """
    words = list(service.bad_words)
    for number, word in enumerate(body.bad_words or ()):
        param = f"bad_words[{number}]"
        with naming(param):
            found = service.tokenizer.bad_word(word)
        if not found:
            raise InvalidRequest(f"`{param}` is {word!r}, which has no tokens", param=param)
        words += found
    allowed = set(body.allowed_token_ids or ())
    never = {word[0] for word in words if len(word) == 1}
    never.update(stop_ids if body.min_tokens else ())
    if allowed <= never if allowed else len(never) >= service.tokenizer.vocabulary:
        raise InvalidRequest(
            "`allowed_token_ids`, `bad_words` and `min_tokens` together leave no token that a"
            " completion could begin with; allow more tokens",
            param="allowed_token_ids" if body.allowed_token_ids else "bad_words",
        )
    return TokenConstraints(
        min_tokens=body.min_tokens or 0,
        bad_words=tuple(dict.fromkeys(words)),
        allowed_ids=tuple(sorted(allowed)),
    )


def _rule(options: Options, defaults: Defaults, mode: Mode) -> Rule:
    """Return the rule, or the mode's own where the default rule does not fit the mode."""
    rule = options.rule or defaults.rule
    if mode is Mode.CASCADE:
        return rule
    kinds, otherwise = RULES[mode]
    if isinstance(rule, kinds):
        return rule
    if options.rule is None:
        return otherwise
    names = (one.default for kind in kinds for one in fields(kind) if one.name == "kind")
    allowed = " or ".join(f"`{name}`" for name in names) or "no rule at all"
    raise InvalidRequest(
        f"`cascade.rule` is `{rule.kind}`, but mode `{mode}` takes {allowed}", param="cascade.rule"
    )


def _verification(options: Options, defaults: Defaults, coupling: Coupling) -> Verification:
    """Return how blocks are verified; `gumbel` coupling allows token by token only."""
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
    """Return the block length; None lets the router choose."""
    requested = options.draft_tokens
    if isinstance(requested, int):
        check_at_most(requested, service.limits.draft_tokens, "cascade.draft_tokens")
    chosen = service.defaults.draft_tokens if requested is None else requested
    return chosen if isinstance(chosen, int) else None


def _stop_strings(body: Generated) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
