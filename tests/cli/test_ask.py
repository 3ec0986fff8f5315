from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cascade.cli import app
from cascade.cli.ask import STYLES, draft_length, rule_object, server_url, visible
from cascade.errors import StartupError
from cascade.types import Origin

Response = tuple[int, str, bytes]
Serving = Callable[[Mapping[str, Response]], Any]
Ask = Callable[..., tuple[Result, Any]]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STATISTICS = {
    "rounds": 2,
    "drafted": 4,
    "accepted": 3,
    "drafter_tokens": 2,
    "kept_tokens": 1,
    "expert_tokens": 1,
    "drafter_passes": 5,
    "expert_passes": 2,
    "deferral_rate": 0.25,
    "sent_bytes": 1200,
    "received_bytes": 34,
    "drafter_s": 0.5,
    "expert_s": 0.25,
}
USAGE = {"choices": [], "usage": {"completion_tokens": 4, "cascade": STATISTICS}}
ROUND = {
    "position": 3, "drafted": 4, "accepted": 3, "deferred": 1, "tokens": 4,
    "draft_ms": 1.25, "judge_ms": 2.5,
}  # fmt: skip


def _chunk(
    tokens: list[str], origins: str, *, finish: str | None = None, trace: Any = None
) -> dict[str, Any]:
    cascade: dict[str, Any] = {"origins": origins, "tokens": tokens}
    if trace is not None:
        cascade["trace"] = trace
    choice = {
        "index": 0,
        "delta": {"content": "".join(tokens)},
        "finish_reason": finish,
        "cascade": cascade,
    }
    return {"object": "chat.completion.chunk", "choices": [choice]}


ANSWER = (
    _chunk([], ""),
    _chunk(["Edwin", ' "Buzz"'], "ek"),
    _chunk([" Aldrin", " is"], "dd"),
    _chunk([], "", finish="stop", trace=[ROUND]),
    USAGE,
)


def events(*values: dict[str, Any], done: bool = True) -> Response:
    lines = [f"data: {json.dumps(value)}\n\n" for value in values]
    text = ": keep-alive\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else "")
    return 200, "text/event-stream", text.encode()


def problem(status: int, message: str, *, param: str | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return status, "application/json", json.dumps({"error": error}).encode()


def run(url: str, *arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, ["ask", "--url", url, *arguments], **options)


@pytest.fixture
def ask(serving: Serving) -> Ask:
    """Ask a server that answers with one recorded response."""

    def one(response: Response, *arguments: str, **options: Any) -> tuple[Result, Any]:
        with serving({CHAT: response, TEXT: response}) as server:
            return run(server.url, *arguments, **options), server

    return one


def test_only_the_answer_is_written_to_standard_output(ask: Ask) -> None:
    result, _ = ask(events(*ANSWER), "Who is Buzz Aldrin?")
    assert result.stdout == 'Edwin "Buzz" Aldrin is\n'
    assert result.exit_code == 0


def test_each_token_has_the_colour_of_its_origin(ask: Ask) -> None:
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    result, _ = ask(events(*ANSWER), "Hi", color=True, env=colours)
    assert "\x1b[1;35mEdwin\x1b[0m" in result.stdout
    assert '\x1b[1;33m "Buzz"\x1b[0m' in result.stdout
    assert "\x1b[32m Aldrin\x1b[0m" in result.stdout
    assert set(STYLES) == {origin.value for origin in Origin}


def test_the_statistics_show_origins_and_costs(ask: Ask) -> None:
    result, _ = ask(events(*ANSWER), "Hi")
    for text in ("2   50%", "1   25%", "2.00", "3 of 4   75%", "0.25", "1,234", "0.500 s, 0.250 s"):
        assert text in result.stderr


def test_rounds_without_a_draft_are_shown_with_their_causes(ask: Ask) -> None:
    lost = STATISTICS | {"undrafted_rounds": {"collapsed": 7, "lease": 1}}
    trace = [ROUND, ROUND | {"drafted": 0, "undrafted": "lease"}]
    usage = {"choices": [], "usage": {"cascade": lost}}
    ended = _chunk([], "", finish="stop", trace=trace)
    result, _ = ask(events(_chunk(["a"], "e"), ended, usage), "Hi", "--trace")
    assert "rounds without a draft" in result.stderr
    assert "collapsed 7, lease 1" in result.stderr
    assert "undrafted" in result.stderr
    assert "rounds without a draft" not in ask(events(*ANSWER), "Hi")[0].stderr


def test_the_rounds_are_shown_when_asked_for(ask: Ask) -> None:
    result, recorded = ask(events(*ANSWER), "Hi", "--trace")
    assert recorded.bodies[0]["cascade"] == {"trace": True}
    assert "judge_ms" in result.stderr
    assert "1.2" in result.stderr


def test_options_reach_the_request(ask: Ask) -> None:
    _, recorded = ask(
        events(*ANSWER), "Hi", "--model", "demo", "--mode", "cascade", "--rule", "token_v3",
        "--alpha", "0.8", "--draft-tokens", "7", "--max-tokens", "9", "--temperature", "0.5",
        "--seed", "3",
    )  # fmt: skip
    assert recorded.bodies[0] == {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "demo",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cascade": {
            "mode": "cascade",
            "rule": {"kind": "token_v3", "alpha": 0.8},
            "draft_tokens": 7,
        },
    }


def test_a_question_without_options_sends_no_cascade_object(ask: Ask) -> None:
    _, recorded = ask(events(*ANSWER), "Hi")
    assert "cascade" not in recorded.bodies[0]


def test_a_completion_continues_text(ask: Ask) -> None:
    chunk = {"choices": [{"index": 0, "text": "Rome", "finish_reason": "length"}]}
    result, recorded = ask(events(chunk, USAGE), "The capital is", "--completion")
    assert recorded.bodies[0]["prompt"] == "The capital is"
    assert result.stdout == "Rome\n"
    assert "cut at --max-tokens" in result.stderr


def test_a_dash_reads_the_question_from_standard_input(ask: Ask) -> None:
    _, recorded = ask(events(*ANSWER), "-", input="From a pipe")
    assert recorded.bodies[0]["messages"][0]["content"] == "From a pipe"


def test_a_key_is_sent_as_a_bearer_token(ask: Ask) -> None:
    _, recorded = ask(events(*ANSWER), "Hi", "--api-key", "secret")
    assert recorded.headers[0]["authorization"] == "Bearer secret"


def test_a_server_without_origins_is_supported(ask: Ask) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}]}
    result, _ = ask(events(chunk), "Hi")
    assert (result.stdout, result.stderr, result.exit_code) == ("Hello\n", "", 0)


def test_the_error_of_a_refused_request_names_the_parameter(ask: Ask) -> None:
    result, _ = ask(problem(400, "alpha is 9; 0 to 1 is allowed", param="cascade.rule.alpha"), "Hi")
    assert result.exit_code == 1
    assert result.stderr == (
        "error 400: alpha is 9; 0 to 1 is allowed (parameter cascade.rule.alpha)\n"
    )


def test_an_error_that_is_not_json_is_shown_in_one_line(ask: Ask) -> None:
    result, _ = ask((502, "text/html", b"<h1>Bad\ngateway</h1>"), "Hi")
    assert result.stderr == "error 502: <h1>Bad gateway</h1>\n"
    assert result.exit_code == 1


def test_an_error_in_the_stream_follows_the_text_before_it(ask: Ask) -> None:
    error = {"error": {"message": "No expert replica answers", "param": None}}
    result, _ = ask(events(_chunk(["Ed"], "d"), error, done=False), "Hi")
    assert result.stdout == "Ed\n"
    assert result.stderr == "error No expert replica answers\n"
    assert result.exit_code == 1


def test_a_stream_without_its_end_mark_is_an_error(ask: Ask) -> None:
    result, _ = ask(events(_chunk(["Ed"], "d"), done=False), "Hi")
    assert "cut before its end" in result.stderr
    assert result.exit_code == 1


def test_invalid_json_in_the_stream_is_an_error(ask: Ask) -> None:
    result, _ = ask((200, "text/event-stream", b"data: [1, 2\n\n"), "Hi")
    assert "where JSON was expected" in result.stderr


def test_the_error_without_a_server_is_one_line_that_says_how_to_start_one(
    serving: Serving,
) -> None:
    with serving({}) as server:
        pass
    result = run(server.url, "Hi")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "serve run cluster/local.yaml" in result.stderr


@pytest.mark.parametrize("text", ["http://127.0.0.1:many", "not a url", "grpc://127.0.0.1:9000"])
def test_an_invalid_url_is_refused(text: str) -> None:
    result = run(text, "Hi")
    assert result.stderr.startswith(f"error {text!r} is not a URL")
    assert "wanted one like http://127.0.0.1:8000" in result.stderr
    assert result.exit_code == 2


HOSTS = ["127.0.0.1", "localhost", "models.example.com", "a_b", "[::1]", "[fe80::1%25eth0]"]


@given(
    scheme=st.sampled_from(["", "http://", "https://", "HTTP://"]),
    host=st.sampled_from(HOSTS),
    port=st.sampled_from(["", ":8000"]),
    path=st.sampled_from(["", "/pre"]),
    end=st.sampled_from(["", "/", "//", "/v1", "/v1/", "/v1/chat/completions"]),
)
def test_a_url_is_the_root_of_the_server_however_it_is_written(
    scheme: str, host: str, port: str, path: str, end: str
) -> None:
    root = f"{scheme.lower() or 'http://'}{host}{port}{path}"
    assert server_url(f" {scheme}{host}{port}{path}{end}\n") == root
    assert server_url(root) == root


@given(st.text() | st.from_regex(r"(\w*:?/{0,2})?[\w.:\[\]@-]*(:\d*)?(/\S*)?"))
def test_any_text_is_a_url_that_can_be_asked_or_refused_in_our_words(text: str) -> None:
    with suppress(StartupError):  # other errors would be tracebacks
        root = server_url(text)
        assert root.startswith(("http://", "https://"))
        assert httpx.URL(f"{root}/health").host
        assert server_url(root) == root


@pytest.mark.parametrize(
    "text", ["::1", "http://::1:8000", "", "http://", "/v1", "http:/h", "http//h", "h:0", "h:99999"]
)
def test_what_is_not_the_url_of_a_server_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="is not a URL"):
        server_url(text)


@pytest.mark.parametrize(
    "command", ["evaluate facts --url", "bench run facts --url", "doctor --url"]
)
def test_every_command_refuses_such_a_url_in_the_same_words(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "h:many"])
    assert "error 'h:many' is not a URL of a server" in result.stderr
    assert result.exit_code == 2


def test_https_to_a_server_without_tls_is_told_to_try_http(serving: Serving) -> None:
    with serving({}) as server:
        result = run(server.url.replace("http:", "https:"), "Hi")
    assert "does it speak http?" in result.stderr


@pytest.mark.parametrize(("question", "piped"), [("", ""), (" \n", ""), ("-", "")])
def test_an_empty_question_is_refused(ask: Ask, question: str, piped: str) -> None:
    result, recorded = ask(events(*ANSWER), question, input=piped)
    assert recorded.bodies == []
    assert "it is empty" in result.stderr
    assert result.exit_code == 2


def test_a_mistyped_choice_names_the_nearest(ask: Ask) -> None:
    result, _ = ask(events(*ANSWER), "Hi", "--mode", "specultive")
    words = " ".join(result.stderr.replace("│", " ").split())  # without the frame
    assert "did you mean `speculative`?" in words
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("rule", "alpha", "object_"),
    [
        (None, None, None),
        ("lossless", None, {"kind": "lossless"}),
        ("chow", 0.4, {"kind": "chow", "alpha": 0.4}),
        ('{"kind": "ensemble", "weight": 0.5}', None, {"kind": "ensemble", "weight": 0.5}),
    ],
)
def test_a_rule_is_a_kind_or_an_object(
    rule: str | None, alpha: float | None, object_: dict[str, Any] | None
) -> None:
    assert rule_object(rule, alpha) == object_


@pytest.mark.parametrize(("rule", "alpha"), [(None, 0.5), ("{kind", None)])
def test_an_invalid_rule_is_refused(rule: str | None, alpha: float | None) -> None:
    with pytest.raises(typer.BadParameter):
        rule_object(rule, alpha)


@pytest.mark.parametrize(("given", "length"), [(None, None), ("auto", "auto"), ("0", 0)])
def test_a_draft_length_is_a_number_or_auto(given: str | None, length: int | str | None) -> None:
    assert draft_length(given) == length


@pytest.mark.parametrize("given", ["-1", "many", "2.5"])
def test_another_draft_length_is_a_usage_error(given: str) -> None:
    assert run("http://127.0.0.1", "Hi", f"--draft-tokens={given}").exit_code == 2


def test_a_model_cannot_control_the_terminal() -> None:
    assert (
        visible("a\x1b[2Jb\n\tc\x07")
        == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc\N{REPLACEMENT CHARACTER}"
    )
    assert visible("Café 漢字") == "Café 漢字"


def test_an_empty_answer_has_statistics_too(ask: Ask) -> None:
    empty = {"choices": [], "usage": {"cascade": dict.fromkeys(STATISTICS, 0)}}
    result, _ = ask(events(_chunk([], "", finish="stop"), empty), "Hi")
    assert result.exit_code == 0
    assert "tokens per expert pass" not in result.stderr
