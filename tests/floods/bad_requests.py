"""Requests that no server may serve, of many kinds: each is to be refused, and nothing else."""

from __future__ import annotations

import gzip
import json
import random
from typing import TYPE_CHECKING, Any

from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PATHS = (COMPLETIONS, CHAT, RESPONSES, "/tokenize", "/detokenize")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, "", "x" * 5000, "\ud800", "\0",
    [], [[]], [[[[]]]], {}, {"": {}}, {"a": [None]}, [2**40], ["a", 1], [{"role": 5}],
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "input", "n", "best_of", "max_tokens", "temperature", "top_p",
    "top_k", "min_p", "stop", "seed", "logit_bias", "logprobs", "top_logprobs", "stream",
    "stream_options", "tools", "tool_choice", "response_format", "prediction", "cascade", "suffix",
    "max_completion_tokens", "max_output_tokens", "stop_token_ids", "repetition_penalty", "tokens",
    "chat_template", "ignore_eos", "user_is_unknown_here",
)  # fmt: skip
CASCADES: tuple[Any, ...] = (
    {"rule": {"kind": "no such"}}, {"rule": {"kind": "chow", "threshold": 7}}, {"draft_tokens": -1},
    {"mode": "fastest"}, {"mode": 3}, {"rule": [[]]}, {"deadline_s": -1}, {"deadline_s": 1e400},
    {"rows": "all"}, {"on_expert_loss": "cry"}, {"draft_tokens": 10**9},
)  # fmt: skip
GRAMMARS: tuple[Any, ...] = (
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
    {"type": "yaml"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
)  # fmt: skip


def http_request(number: int) -> tuple[str, bytes]:
    """Return the kind and the bytes of a bad HTTP request; each number has its own."""
    draw = random.Random(number)  # noqa: S311 - to repeat, not to keep a secret
    make = _HTTP[number % len(_HTTP)]
    return make.__name__, make(draw)


def _request(
    body: bytes | Any, *, path: str = COMPLETIONS, method: str = "POST", headers: str = ""
) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode(errors="surrogatepass")
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
    )
    return head.encode("latin-1") + data


def _wrong_value(draw: random.Random) -> bytes:
    """A field whose value cannot be right: nested in itself, so that no type takes it."""
    path, field = draw.choice(PATHS), draw.choice(FIELDS)
    value = [[draw.choice(VALUES), [draw.choice(VALUES)]], {"x": draw.choice(VALUES)}]
    return _request({field: value}, path=path)


def _wrong_type(draw: random.Random) -> bytes:
    """All that is needed, and one field that no value of `VALUES` makes right."""
    body = {"prompt": "x", "max_tokens": 1, "n": draw.choice((-1, 0, "x", 10**400, [], 1.5))}
    return _request(body)


def _no_json(draw: random.Random) -> bytes:
    bodies = (
        b"", b"{", b"[" * 200_000, b'{"a":' * 100_000, b'"', b"nul", b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}{',
        b"1" * 100_000, b"[]", b"null", b'{"prompt": "x",}', b"\0" * 1000, draw.randbytes(300),
        b'{"prompt":"x","prompt":' + b"[" * 500,
    )  # fmt: skip
    return _request(draw.choice(bodies), path=draw.choice(PATHS))


def _unknown_route(draw: random.Random) -> bytes:
    path = draw.choice(
        ("/v1/nothing", "/v1/models/none", "/" + "a" * 6000, "/%00", "/..%2f..%2fetc/passwd",
         "//v1//completions", "/v1/completions%20", "/%ff%fe", "/v1/embeddings")
    )  # fmt: skip
    return _request(b"", path=path, method=draw.choice(("GET", "PUT", "DELETE", "PATCH")))


def _wrong_method(draw: random.Random) -> bytes:
    method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"))
    return _request(b"", path=draw.choice(PATHS), method=method)


def _odd_headers(draw: random.Random) -> bytes:
    """Headers that parts of a server read; the body is wrong too, so that none may succeed."""
    lines = (
        "content-encoding: gzip\r\n", "content-encoding: br, zstd\r\n",
        "x-request-timeout-seconds: -1e999\r\n", "x-request-timeout-seconds: x\r\n",
        "authorization: Bearer \xff\r\n", "authorization: \r\n", f"x-request-id: {'a' * 5000}\r\n",
        "x-session-id: \xc3\xa4\r\n", "serve_multiplexed_model_id: none\r\n", "cookie: a=\xe4\r\n",
        "".join(f"x-{number}: {'a' * 100}\r\n" for number in range(90)), "accept: \x7f\r\n",
        "traceparent: 00-zz-zz-zz\r\n", "x-request-disconnect-disabled: ?1\r\n", "upgrade: h2c\r\n",
    )  # fmt: skip
    return _request({"prompt": 5}, path=draw.choice(PATHS), headers=draw.choice(lines))


def _compressed(draw: random.Random) -> bytes:
    data = gzip.compress(b'{"prompt": "' + b"x" * draw.randrange(10, 1_000_000) + b'"}')
    return _request(data, path=draw.choice(PATHS), headers="content-encoding: gzip\r\n")


def _no_http(draw: random.Random) -> bytes:
    return draw.choice(
        (
            draw.randbytes(200) + b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
            b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9, b"GET / HTTP/1.1\r\n: x\r\n\r\n",
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
            b"GET / HTTP/1.1\r\nhost x\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n",
        )
    )  # fmt: skip


def _wrong_policy(draw: random.Random) -> bytes:
    return _request({"prompt": "x", "max_tokens": 1, "cascade": draw.choice(CASCADES)})


def _wrong_grammar(draw: random.Random) -> bytes:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    return _request(body | {"response_format": draw.choice(GRAMMARS)}, path=CHAT)


_HTTP: tuple[Callable[[random.Random], bytes], ...] = (
    _wrong_value, _wrong_type, _no_json, _unknown_route, _wrong_method, _odd_headers, _compressed,
    _no_http, _wrong_policy, _wrong_grammar,
)  # fmt: skip


def grpc_request(number: int) -> tuple[str, bytes]:
    """Return method and message of a bad call."""
    draw = random.Random(number)  # noqa: S311 - to repeat, not to keep a secret
    method = draw.choice(("Generate", "GenerateStream", "Tokenize", "Detokenize"))
    return method, _GRPC[number % len(_GRPC)](draw, method)


def _no_message(draw: random.Random, method: str) -> bytes:
    del method
    # The first byte asks for a group that never ends, so that no bytes after it are a message.
    return b"\x0b" + draw.randbytes(draw.randrange(300))


def _empty(draw: random.Random, method: str) -> bytes:
    del draw
    return b"\x0b" if method == "Detokenize" else b""  # no tokens are no mistake


def _wrong_generation(draw: random.Random, method: str) -> bytes:
    generation = pb.Generation(text="x", max_tokens=1)
    match draw.randrange(8):
        case 0:
            generation.max_tokens = -5
        case 1:
            generation.sampling.temperature = float("nan")
        case 2:
            generation.sampling.top_p = 2.0
        case 3:
            generation.choice_count = 10**9
        case 4:
            generation.logprob_count = 10**6
        case 5:
            generation.model = "none"
        case 6:
            generation.text = ""
        case _:
            generation.tokens.token_ids.extend([2**32 - 1] * 5)
    if method == "GenerateStream":
        return pb.GenerateStreamRequest(generation=generation).SerializeToString()
    if method == "Generate":
        return pb.GenerateRequest(generation=generation).SerializeToString()
    return b"\x0b"


_GRPC: tuple[Callable[[random.Random, str], bytes], ...] = (_no_message, _empty, _wrong_generation)
