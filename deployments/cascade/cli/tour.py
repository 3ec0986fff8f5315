"""`cascade tour`: one question answered in four ways, from a cascade to a speculative cascade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cascade.cli.ask import STYLES, AskError, Key, Report, Token, Url, complete, connect, visible

QUESTION = "Who is Buzz Aldrin?"


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One way of answering: the request's `cascade`, and what to look at."""

    title: str
    about: str
    cascade: dict[str, Any]


STOPS = (
    Stop(
        title="A cascade that trusts the small model",
        about="The small model answers; it is sure enough, so its whole answer stays. Cheap, and"
        " never better than the small model.",
        cascade={"mode": "sequence_cascade", "patience": {"threshold": -100}},
    ),
    Stop(
        title="A cascade that defers",
        about="It is not sure enough: its whole answer is thrown away, and the large model starts"
        " from scratch. Nobody sees a word before the small model has finished.",
        cascade={"mode": "sequence_cascade", "patience": {"threshold": 0}},
    ),
    Stop(
        title="Speculative decoding",
        about="The large model checks a few drafted words in one pass. It would word the answer"
        " otherwise, so it refuses good words because they are not its own.",
        cascade={"mode": "speculative", "draft_tokens": 5, "trace": True},
    ),
    Stop(
        title="A speculative cascade",
        about="The same pass, and a rule that keeps words which are good enough: the small model's"
        " wording, with the large model's help where it matters.",
        cascade={"mode": "cascade", "rule": {"kind": "token_v3", "alpha": 0.9}, "draft_tokens": 5},
    ),
)


def tour(
    *,
    url: Url = "http://127.0.0.1:8000",
    question: Annotated[str, typer.Option(help="Answered by a running server")] = QUESTION,
    api_key: Key = None,
) -> None:
    """Answer one question in four ways, and show who wrote each word and what it took."""
    console = Console(highlight=False)
    console.print(Text.assemble(("Question: ", "bold"), question))
    _print_legend(console)
    passes: list[int] = []
    try:
        with connect(url, api_key) as client:
            for number, stop in enumerate(STOPS, start=1):
                console.print(Text(f"\n{number}. {stop.title}", "bold"))
                console.print(stop.about, style="dim")
                body = {
                    "messages": [{"role": "user", "content": question}],
                    "temperature": 0,
                    "max_tokens": 128,
                    "cascade": stop.cascade,
                }
                tokens = list[Token]()
                report = Report(usage={}, finish=None, trace=[])
                for item in complete(client, "/v1/chat/completions", body):
                    if isinstance(item, Token):
                        tokens.append(item)
                    else:
                        report = item
                _print_answer(console, tokens)
                passes.append(_print_cost(console, report))
    except AskError as error:
        line = Text.assemble(("error ", "bold red"), str(error))
        Console(stderr=True).print(line, soft_wrap=True)
        raise typer.Exit(error.status) from error
    _, deferred, speculative, cascade = passes
    console.print(
        f"\nFor this answer the large model ran {deferred} times from scratch, {speculative} times"
        f" to check every word, and {cascade} times in the speculative cascade."
    )


def _print_legend(console: Console) -> None:
    words = zip(("drafted", "kept by the rule", "written by the large model"), STYLES.values())  # noqa: B905 - the tour forces no token
    console.print(Text(", ").join(Text(word, style) for word, style in words))


def _print_answer(console: Console, tokens: list[Token]) -> None:
    parts = (Text(visible(one.text), STYLES.get(one.origin or "", "")) for one in tokens)
    console.print(Text("   ").append_text(Text.assemble(*parts)), soft_wrap=True)


def _print_cost(console: Console, report: Report) -> int:
    """Print what an answer took; return the passes of the expert."""
    found = report.usage.get("cascade", {})
    expert, drafter = found.get("expert_passes", 0), found.get("drafter_passes", 0)
    text = f"   {expert} passes of the large model, {drafter} of the small one"
    if report.trace:
        first = report.trace[0]
        text += f"; of the first {first['drafted']} drafted words {first['accepted']} stay"
    console.print(text, style="dim")
    return expert
