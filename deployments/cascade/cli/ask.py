"""`cascade ask`: one question to a running server, its answer coloured by who wrote it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.types import Mode, Origin

if TYPE_CHECKING:
    from collections.abc import Iterator


CONNECT_TIMEOUT_S = 5.0

READ_TIMEOUT_S = 120.0

_DATA = "data:"

_END = "[DONE]"


class AskError(Exception):
    """Why there is no whole answer, in one line; `status` is the exit status."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A piece of the answer. `origin` is d, k or e, and None from a server that does not say."""

    text: str
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came with the answer: OpenAI's usage, the reason it ended and the rounds, if asked."""

    usage: dict[str, Any]
    finish: str | None
    trace: list[dict[str, Any]]


def complete(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[Token | Report]:
    """Yield the tokens of one answer as they come, and at the end a report.

    Raises:
        AskError: No server, an error of the server, or a stream that was cut.
    """
    request = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("POST", path, json=request) as response:
            if response.is_error:
                response.read()
                raise AskError(_refusal(response))
            yield from _read(response)
    except httpx.ConnectError as error:
        raise AskError(
            f"no server answers at {client.base_url} ({error}); "
            "start one with `serve run cluster/local.yaml`, or name another with --url",
            status=3,
        ) from error
    except httpx.TimeoutException as error:
        raise AskError(
            f"the server at {client.base_url} fell silent; the answer stops here", status=3
        ) from error
    except httpx.HTTPError as error:
        raise AskError(f"the connection to {client.base_url} broke: {error}", status=3) from error


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
    """Yield the events of a stream up to its end mark."""
    for line in response.iter_lines():
        if not line.startswith(_DATA):
            continue
        text = line.removeprefix(_DATA).strip()
        if text == _END:
            return
        event = _parsed(text)
        if "error" in event:
            raise AskError(_message(event["error"]))
        yield event
    raise AskError("the stream was cut before its end; the answer may be incomplete")


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise AskError(f"the server sent {text[:80]!r} where JSON was expected")
    return value


def _tokens(choice: dict[str, Any]) -> Iterator[Token]:
    """Yield a choice's new tokens, or its text as one piece if the server does not name tokens."""
    extension = choice.get("cascade") or {}
    if extension.get("tokens"):
        for text, origin in zip(extension["tokens"], extension["origins"], strict=False):
            yield Token(text=text, origin=origin)
        return
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    if text:
        yield Token(text=text)


def _refusal(response: httpx.Response) -> str:
    """Return what an error response says, in one line."""
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
}

_LEGEND = (
    ("drafter", Origin.DRAFTER.value),
    ("drafter, kept by the rule", Origin.KEPT.value),
    ("expert", Origin.EXPERT.value),
)

_PRINTED_CONTROLS = "\n\t"


Url = Annotated[str, typer.Option(envvar="CASCADE_URL", help="The server")]

Key = Annotated[str | None, typer.Option(envvar="CASCADE_API_KEY", help="If the server wants one")]

RuleText = Annotated[
    str | None, typer.Option(help="A rule's kind, such as token_v3, or a JSON object")
]

Length = Annotated[str | None, typer.Option(help="Tokens the drafter writes ahead, or auto")]

Chat = Annotated[
    bool, typer.Option("--chat/--completion", help="Ask, or let the text be continued")
]


def ask(  # noqa: PLR0913 - one parameter an option
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input")],
    *,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="A served model; the first if absent")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Who writes")] = None,
    rule: RuleText = None,
    alpha: Annotated[float | None, typer.Option(help="The rule's dial; needs --rule")] = None,
    draft_tokens: Length = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text")] = None,
    chat: Chat = True,
    trace: Annotated[bool, typer.Option("--trace", help="Show every round")] = False,
    api_key: Key = None,
) -> None:
    """Ask a running server, and see which model wrote each token of the answer."""
    cascade = {
        "mode": mode and mode.value,
        "rule": rule_object(rule, alpha),
        "draft_tokens": draft_length(draft_tokens),
        "trace": trace or None,
    }
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cascade": _given(cascade) or None,
    }
    path, words = _question(sys.stdin.read() if prompt == "-" else prompt, chat=chat)
    try:
        with _client(url, api_key) as client:
            report = _print_answer(complete(client, path, words | _given(body)))
    except AskError as error:
        raise _failed(error) from error
    _print_report(report)


def _question(text: str, *, chat: bool) -> tuple[str, dict[str, Any]]:
    """Return the path that `text` goes to, and its part of the body."""
    if chat:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {"prompt": text}


def _failed(error: AskError) -> typer.Exit:
    """Print an error in one line and return what ends the program."""
    line = Text.assemble(("error ", "bold red"), str(error))
    Console(stderr=True).print(line, soft_wrap=True)
    return typer.Exit(error.status)


def rule_object(rule: str | None, alpha: float | None) -> dict[str, Any] | None:
    """Return the request's `rule`: a kind with its alpha, or the JSON object as given."""
    if rule is None:
        if alpha is not None:
            raise typer.BadParameter("--alpha belongs to a rule; add --rule, such as token_v3")
        return None
    if not rule.startswith("{"):
        return {"kind": rule} | ({} if alpha is None else {"alpha": alpha})
    try:
        return json.loads(rule) | ({} if alpha is None else {"alpha": alpha})
    except ValueError as error:
        raise typer.BadParameter(f"--rule is no JSON object: {error}") from error


def draft_length(given: str | None) -> int | str | None:
    """Return the request's `draft_tokens`: a number or auto."""
    if given is None or given == "auto":
        return given
    if not given.isdecimal():
        raise typer.BadParameter(f"--draft-tokens is {given!r}; give a number from 0 on, or auto")
    return int(given)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _client(url: str, api_key: str | None) -> httpx.Client:
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=url, timeout=timeout, headers=headers)
    except httpx.InvalidURL as error:
        raise AskError(f"{url!r} is no address: {error}", status=2) from error


def _print_answer(items: Iterator[Token | Report]) -> Report:
    """Print tokens as they come to standard output; return the report that ends them."""
    console = Console(highlight=False)
    report, begun = Report(usage={}, finish=None, trace=[]), False
    try:
        for item in items:
            if isinstance(item, Report):
                report = item
                continue
            begun = True
            style = STYLES.get(item.origin or "", "")
            console.print(Text(visible(item.text), style), end="", soft_wrap=True)
    finally:
        if begun:
            console.print()
    return report


def visible(text: str) -> str:
    """Return `text` with control characters replaced: a model must not steer the terminal."""
    return "".join(
        letter
        if letter.isprintable() or letter in _PRINTED_CONTROLS
        else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def _print_report(report: Report) -> None:
    """Print statistics and rounds to standard error, so that a pipe gets the answer alone."""
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
    """Return what the answer cost. The rows of tokens are the legend too."""
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    counts = [statistics.get(f"{name}_tokens", 0) for name in ("drafter", "kept", "expert")]
    total = sum(counts)
    for (label, origin), count in zip(_LEGEND, counts, strict=True):
        share = f"{count}  {count / total:4.0%}" if total else str(count)
        table.add_row(Text(f"tokens of the {label}", STYLES[origin]), share)
    passes, drafted = statistics.get("expert_passes", 0), statistics.get("drafted", 0)
    if passes:
        table.add_row("tokens per expert pass", f"{total / passes:.2f}")
    table.add_row(
        "expert passes, drafter passes", f"{passes}, {statistics.get('drafter_passes', 0)}"
    )
    if drafted:
        accepted = statistics.get("accepted", 0)
        table.add_row("drafts accepted", f"{accepted} of {drafted}  {accepted / drafted:4.0%}")
        table.add_row("deferral rate", f"{statistics.get('deferral_rate', 0):.2f}")
    sent, received = (statistics.get(f"{way}_bytes", 0) for way in ("sent", "received"))
    table.add_row("bytes between the tiers", f"{sent + received:,}")
    waits = [statistics.get(f"{tier}_s", 0) for tier in ("drafter", "expert")]
    table.add_row("waited for drafter, expert", "{:.3f} s, {:.3f} s".format(*waits))
    return table


def _rounds(trace: list[dict[str, Any]]) -> Table:
    names = ("position", "drafted", "accepted", "deferred", "tokens", "draft_ms", "judge_ms")
    table = Table(*names, box=None, header_style="dim")
    for row in trace:
        values = (row.get(name, "") for name in names)
        table.add_row(
            *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)
        )
    return table
