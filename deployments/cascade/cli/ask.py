"""`cascade ask`: asks a running server, and colours each token by the model that wrote it."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.errors import StartupError
from cascade.types import Mode, Origin

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECT_TIMEOUT_S = 5.0

READ_TIMEOUT_S = 120.0


def server_url(text: str) -> str:
    """Return the root of a server: with a scheme, without `/v1` and what may follow it.

    Raises:
        StartupError: It is not the URL of an HTTP server.
    """
    try:
        url = httpx.URL(text.strip() if "://" in text else f"http://{text.strip()}")
    except httpx.InvalidURL as error:
        problem = str(error)
    else:
        path = re.sub(r"/v1(/.*)?$", "", url.path).rstrip("/")
        if url.scheme not in {"http", "https"}:
            problem = f"its scheme is {url.scheme}"
        elif url.host in {"http", "https"}:
            problem = "a scheme ends in ://"
        elif not re.fullmatch(r"[\w.-]+|[\da-fA-F:.]+(%\w+)?", url.host):
            problem = f"{url.host!r} is no host"
        elif url.port is not None and not 0 < url.port < 2**16:
            problem = f"there is no port {url.port}"
        elif url.query or url.fragment:
            problem = "it has a query"
        else:
            return str(url.copy_with(path=path or "/")).rstrip("/")
    raise StartupError(
        f"{text!r} is not a URL of a server: {problem}; wanted one like http://127.0.0.1:8000,"
        " https://models.example.com or http://[::1]:8000"
    )


class AskError(Exception):
    """Why there is no complete answer, in one line; `status` is the exit status."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A piece of the answer. `origin` is d, k or e, or None from a server without origins."""

    text: str
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """OpenAI's usage, the finish reason and, if requested, the trace of rounds."""

    usage: dict[str, Any]
    finish: str | None
    trace: list[dict[str, Any]]


def complete(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[Token | Report]:
    """Yield the tokens of one answer as they arrive, then a report.

    Args:
        client: Connected to the server.
        path: Of the endpoint.
        body: Of the request, to which streaming is added.

    Raises:
        AskError: No server answers, it returns an error, or the stream ends early.
    """
    request = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("POST", path, json=request) as response:
            if response.is_error:
                response.read()
                raise AskError(_http_error(response))
            yield from _read(response)
    except httpx.ConnectError as error:
        raise AskError(
            f"{unreachable(str(client.base_url), error)}; "
            "start one with `serve run cluster/local.yaml`, or name another with --url",
            status=3,
        ) from error
    except httpx.TimeoutException as error:
        raise AskError(
            f"the server at {client.base_url} stopped sending; the answer is incomplete", status=3
        ) from error
    except httpx.HTTPError as error:
        raise AskError(f"the connection to {client.base_url} broke: {error}", status=3) from error


def unreachable(url: str, error: httpx.HTTPError) -> str:
    """Return that no server answers at a URL, and why."""
    tls = url.startswith("https:") and "SSL" in str(error)
    return f"no server answers at {url} ({error})" + ("; does it speak http?" if tls else "")


def _read(response: httpx.Response) -> Iterator[Token | Report]:
    usage: dict[str, Any] = {}
    finish: str | None = None
    trace: list[dict[str, Any]] = []
    for data in _events(response):
        usage = data.get("usage") or usage
        for choice in data.get("choices", [])[:1]:
            finish = choice.get("finish_reason") or finish
            trace = (choice.get("cascade") or {}).get("trace", trace)
            yield from _tokens(choice)
    yield Report(usage=usage, finish=finish, trace=trace)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of a stream up to its end mark."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        try:
            event = json.loads(text)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise AskError(f"the server sent {text[:80]!r} where JSON was expected")
        if "error" in event:
            raise AskError(_message(event["error"]))
        yield event
    raise AskError("the stream was cut before its end; the answer may be incomplete")


def _tokens(choice: dict[str, Any]) -> Iterator[Token]:
    """Yield a choice's new tokens, or its text as one if the server does not send tokens."""
    extension = choice.get("cascade") or {}
    if extension.get("tokens"):
        for text, origin in zip(extension["tokens"], extension["origins"], strict=False):
            yield Token(text=text, origin=origin)
        return
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    if text:
        yield Token(text=text)


def _http_error(response: httpx.Response) -> str:
    """Return the message of an error response, in one line."""
    try:
        message = _message(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(response.text.split())[:200] or response.reason_phrase
    return f"{response.status_code}: {message}"


def _message(error: Any) -> str:
    """Return the message of OpenAI's error object, with the parameter it names."""
    if not isinstance(error, dict):
        return str(error)
    param = f" (parameter {error['param']})" if error.get("param") else ""
    return f"{error.get('message', error)}{param}"


STYLES = {
    Origin.DRAFTER.value: "green",
    Origin.KEPT.value: "bold yellow",
    Origin.EXPERT.value: "bold magenta",
    Origin.FORCED.value: "dim",
}

_LEGEND = {
    "drafter": "tokens of the drafter",
    "kept": "tokens of the drafter, kept by the rule",
    "expert": "tokens of the expert",
    "forced": "tokens that the grammar left no choice of",
}

Url = Annotated[str, typer.Option(envvar="CASCADE_URL", help="The server")]

Key = Annotated[str | None, typer.Option(envvar="CASCADE_API_KEY", help="If the server needs one")]

RuleText = Annotated[
    str | None, typer.Option(help="A rule's kind, such as token_v3, or a JSON object")
]

Length = Annotated[
    str | None, typer.Option(help="Tokens that the drafter drafts in a round, or auto")
]

Chat = Annotated[
    bool, typer.Option("--chat/--completion", help="Send a chat message, or text to continue")
]


def ask(  # noqa: PLR0913 - one parameter an option
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input")],
    *,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="A served model; the first if absent")] = None,
    mode: Annotated[Mode | None, typer.Option(help="How the models share the work")] = None,
    rule: RuleText = None,
    alpha: Annotated[float | None, typer.Option(help="The rule's dial; needs --rule")] = None,
    draft_tokens: Length = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text")] = None,
    chat: Chat = True,
    divergence_budget: Annotated[
        float | None, typer.Option(min=0, help="Most divergence from the expert")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show every round")] = False,
    api_key: Key = None,
) -> None:
    """Ask a running server, and show which model wrote each token of the answer."""
    cascade = {
        "mode": mode and mode.value,
        "rule": rule_object(rule, alpha),
        "draft_tokens": draft_length(draft_tokens),
        "divergence_budget": divergence_budget,
        "trace": trace or None,
    }
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cascade": _without_none(cascade) or None,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter(
            "it is empty; give a question, or - to read it from standard input", param_hint="prompt"
        )
    path, question = "/v1/completions", dict[str, Any](prompt=text)
    if chat:
        path = "/v1/chat/completions"
        question = {"messages": [{"role": "user", "content": text}]}
    try:
        with connect(url, api_key) as client:
            report = _print_answer(complete(client, path, question | _without_none(body)))
    except AskError as error:
        line = Text.assemble(("error ", "bold red"), str(error))
        Console(stderr=True).print(line, soft_wrap=True)
        raise typer.Exit(error.status) from error
    _print_report(report)


def rule_object(rule: str | None, alpha: float | None) -> dict[str, Any] | None:
    """Return the request's `rule`: a kind with its alpha, or the JSON object as given.

    Raises:
        BadParameter: There is an alpha without a rule, or the rule is invalid JSON.
    """
    if rule is None:
        if alpha is not None:
            raise typer.BadParameter("--alpha belongs to a rule; add --rule, such as token_v3")
        return None
    try:
        kind: dict[str, Any] = json.loads(rule) if rule.startswith("{") else {"kind": rule}
    except ValueError as error:
        raise typer.BadParameter(f"--rule is not a JSON object: {error}") from error
    return kind if alpha is None else kind | {"alpha": alpha}


def draft_length(given: str | None) -> int | str | None:
    """Return the request's `draft_tokens`: a number or auto.

    Raises:
        BadParameter: It is neither.
    """
    if given is None or given == "auto":
        return given
    if not given.isdecimal():
        raise typer.BadParameter(f"--draft-tokens is {given!r}; give a number, 0 or more, or auto")
    return int(given)


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def connect(url: str, api_key: str | None) -> httpx.Client:
    """Return a client of the server at a URL; raises AskError if it is none."""
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=server_url(url), timeout=timeout, headers=headers)
    except StartupError as error:
        raise AskError(error.message, status=2) from error


def _print_answer(items: Iterator[Token | Report]) -> Report:
    """Print tokens to standard output as they arrive; return the report at the end."""
    console = Console(highlight=False)
    report, started = Report(usage={}, finish=None, trace=[]), False
    try:
        for item in items:
            if isinstance(item, Report):
                report = item
                continue
            started = True
            style = STYLES.get(item.origin or "", "")
            console.print(Text(visible(item.text), style), end="", soft_wrap=True)
    finally:
        if started:
            console.print()
    return report


def visible(text: str) -> str:
    """Return `text` with control characters replaced: a model must not control the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def _print_report(report: Report) -> None:
    """Print statistics and rounds to standard error, so that a pipe gets only the answer."""
    console = Console(stderr=True, highlight=False)
    if report.finish == "length":
        console.print("cut at --max-tokens", style="dim")
    statistics = report.usage.get("cascade")
    if not statistics:
        return
    console.print(_statistics(statistics))
    if report.trace:
        console.print(_rounds(report.trace))


def _statistics(statistics: dict[str, Any]) -> Table:
    """Return what the answer cost. The rows of tokens are also the legend of the colours."""
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    number = Counter(statistics)  # 0 for what the server does not send
    total = sum(number[f"{name}_tokens"] for name in _LEGEND)
    for (name, label), style in zip(_LEGEND.items(), STYLES.values(), strict=True):
        count = number[f"{name}_tokens"]
        share = f"{count}  {count / total:4.0%}" if total else str(count)
        table.add_row(Text(label, style), share)
    passes, drafted, accepted = (number[name] for name in ("expert_passes", "drafted", "accepted"))
    if passes:
        table.add_row("tokens per expert pass", f"{total / passes:.2f}")
    table.add_row("expert passes, drafter passes", f"{passes}, {number['drafter_passes']}")
    if drafted:
        table.add_row("drafts accepted", f"{accepted} of {drafted}  {accepted / drafted:4.0%}")
        table.add_row("deferral rate", f"{number['deferral_rate']:.2f}")
    if undrafted := statistics.get("undrafted_rounds"):
        causes = ", ".join(f"{cause} {rounds}" for cause, rounds in undrafted.items())
        table.add_row(Text("rounds without a draft", "red"), causes)
    table.add_row("bytes between the tiers", f"{number['sent_bytes'] + number['received_bytes']:,}")
    waits = f"{number['drafter_s']:.3f} s, {number['expert_s']:.3f} s"
    table.add_row("waited for drafter, expert", waits)
    if cost := statistics.get("cost"):
        taken = (f"{cost[tier]['seconds']:.3f} s" for tier in ("drafter", "expert"))
        table.add_row("passes of drafter, expert took", ", ".join(taken))
        if cost["price"] is not None:
            table.add_row("price", f"{cost['price']:.6g}")
        distance = statistics["divergence"]
        shown = "not measured" if distance is None else f"{distance:.3f}"
        table.add_row("divergence from the expert", shown)
    return table


def _rounds(trace: list[dict[str, Any]]) -> Table:
    names = ("position", "drafted", "accepted", "deferred", "tokens", "draft_ms", "judge_ms")
    names += ("undrafted",) * any(one.get("undrafted") for one in trace)
    table = Table(*names, box=None, header_style="dim")
    for one in trace:
        values = (one.get(name, "") for name in names)
        table.add_row(
            *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)
        )
    return table
