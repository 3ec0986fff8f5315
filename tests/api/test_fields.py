"""The fields that vLLM's clients send, over HTTP and gRPC alike."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.struct_pb2 import Struct
from tests.support.toy_tokenizers import byte_level, wrap

from cascade.api import build_request, grpc_convert
from cascade.api.context import Cors, Limits
from cascade.api.keys import Keys
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import InvalidRequest
from cascade.observability.metric_specs import ROUTER
from cascade.observability.metrics import PrometheusMetrics
from cascade.types import TokenConstraints
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.engine.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if not (loop.last and continue_final_message) %}.{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)
ASKED: dict[str, Any] = {"role": "user", "content": "hello"}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "hell"}


@pytest.fixture
def templated(service: ServingContext) -> ServingContext:
    """The service with a template that shows its variables."""
    return replace(service, tokenizer=wrap(byte_level(), chat_template=TEMPLATE))


def over_http(service: ServingContext, **fields: Any) -> CompletionCall:
    if "messages" in fields:
        return build_request.chat(ChatBody.model_validate(fields), service)
    fields = {"prompt": "Buzz"} | fields
    return build_request.completion(CompletionBody.model_validate(fields), service)


def over_grpc(service: ServingContext, **fields: Any) -> CompletionCall:
    fields = fields if {"text", "tokens", "chat"} & set(fields) else {"text": "Buzz"} | fields
    return grpc_convert.call(pb.Generation(**fields), service)


def rendered(call: CompletionCall, service: ServingContext) -> str:
    return service.tokenizer.decode(call.prompts[0], skip_special=False)


def variables(**given: Any) -> Struct:
    struct = Struct()
    struct.update(given)
    return struct


@pytest.mark.parametrize(
    ("fields", "proto", "text"),
    [
        ({}, {}, "[user]hello.[assistant]"),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}, "[user]hello."),
        (
            {"chat_template_kwargs": {"mood": "calm"}},
            {"template_variables": variables(mood="calm")},
            "[user]hello.[assistant]calm",
        ),
    ],
)
def test_the_template_gets_its_variables(
    templated: ServingContext, fields: dict[str, Any], proto: dict[str, Any], text: str
) -> None:
    message = pb.ChatMessage(**ASKED)
    for call in (
        over_http(templated, messages=[ASKED], **fields),
        over_grpc(templated, chat=pb.Chat(messages=[message], **proto)),
    ):
        assert rendered(call, templated) == text


def test_a_last_message_of_the_assistant_is_continued(templated: ServingContext) -> None:
    messages = [ASKED, BEGUN]
    protos = [pb.ChatMessage(**message) for message in messages]
    chat = pb.Chat(messages=protos, continue_final_message=True)
    for call in (
        over_http(templated, messages=messages, continue_final_message=True),
        over_http(
            templated,
            messages=messages,
            continue_final_message=True,
            add_generation_prompt=False,
        ),
        over_grpc(templated, chat=chat),
    ):
        assert rendered(call, templated) == "[user]hello.[assistant]hell"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ],
)
def test_the_template_gets_nothing_else(
    templated: ServingContext, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest, match=param.rpartition(".")[2]) as caught:
        over_http(templated, messages=[ASKED], **fields)
    assert caught.value.param == param


def test_any_name_may_be_a_variable_of_a_template(templated: ServingContext) -> None:
    fields = {"limit": 1, "continue_last": True, "variables": {}}
    call = over_http(templated, messages=[ASKED], chat_template_kwargs=fields)
    assert rendered(call, templated) == "[user]hello.[assistant]"


def test_constraints_reach_the_request(service: ServingContext) -> None:
    word = service.tokenizer.bad_word("Moon")
    wanted = TokenConstraints(min_tokens=3, bad_words=word, allowed_ids=(5, 6, 7))
    fields: dict[str, Any] = {
        "min_tokens": 3,
        "bad_words": ["Moon"],
        "allowed_token_ids": [7, 5, 6, 5],
    }
    for call in (over_http(service, **fields), over_grpc(service, **fields)):
        assert call.requests[0].policy.constraints == wanted
        assert call.text.min_tokens == 3


def test_a_bad_word_is_one_at_the_beginning_and_inside_a_text(tokenizer: Tokenizer) -> None:
    """As vLLM has it: inside only where that is another first token."""
    assert tokenizer.bad_word("a") == (tokenizer.encode("a"),)
    alone, inside = tokenizer.encode("walked"), tokenizer.encode(" walked")
    assert tokenizer.bad_word(" walked") == tokenizer.bad_word("walked")
    same_length = len(alone) == len(inside)
    assert tokenizer.bad_word("walked") == ((alone, inside) if same_length else (alone,))
    assert tokenizer.bad_word(" ") == (tokenizer.encode(" "),)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"allowed_token_ids": [99_999]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0], "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": ["x"] * 3}, "bad_words"),
        ({"bad_words": ["x" * 2000]}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 9_999}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    service: ServingContext, fields: dict[str, Any], param: str
) -> None:
    service = replace(service, limits=Limits(context_tokens=512, bad_words=2))
    for build in (over_http, over_grpc):
        with pytest.raises(InvalidRequest, match=param) as caught:
            build(service, **fields)
        assert caught.value.param == param


def test_the_words_and_tokens_that_are_left_must_begin_something(service: ServingContext) -> None:
    ids = service.tokenizer.encode("a")
    with pytest.raises(InvalidRequest, match="allow more tokens"):
        over_http(service, allowed_token_ids=list(ids), bad_words=["a"])


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (400, 40), (-1, 40)])
def test_a_prompt_is_truncated_at_its_beginning(
    service: ServingContext, keep: int, kept: int
) -> None:
    tokens = list(range(3, 43))
    ids = pb.TokenIds(token_ids=tokens)
    for call in (
        over_http(service, prompt=tokens, truncate_prompt_tokens=keep),
        over_grpc(service, tokens=ids, truncate_prompt_tokens=keep),
    ):
        assert call.prompts == (tuple(tokens[-kept:]),)


def test_a_prompt_that_does_not_fit_keeps_what_does(templated: ServingContext) -> None:
    service = replace(templated, limits=Limits(context_tokens=30))
    (prompt,) = over_http(
        service, prompt="a" * 100, max_tokens=12, truncate_prompt_tokens=-1
    ).prompts
    assert len(prompt) == 18
    chat = {"messages": [{"role": "user", "content": "a" * 100}], "truncate_prompt_tokens": -1}
    call = over_http(service, **chat, max_tokens=12)
    assert rendered(call, service) == ("a" * 100 + ".[assistant]")[-18:]


def test_an_echo_is_of_what_is_left_of_the_prompt(service: ServingContext) -> None:
    call = over_http(service, prompt="Buzz Aldrin", echo=True, truncate_prompt_tokens=1)
    (kept,) = call.prompts
    assert call.echo == ((service.tokenizer.decode(kept),),)


@pytest.mark.parametrize("wanted", [500, 512, 9_999])
def test_a_completion_is_as_long_as_fits_on_request_of_the_server(
    service: ServingContext, wanted: int
) -> None:
    limits = Limits(context_tokens=512, clamp_max_tokens=True)
    left = 512 - len(over_http(service).prompts[0])
    for build in (over_http, over_grpc):
        call = build(replace(service, limits=limits), max_tokens=wanted)
        assert call.requests[0].max_tokens == min(wanted, left)
        call = build(replace(service, limits=replace(limits, max_tokens=7)), max_tokens=wanted)
        assert call.requests[0].max_tokens == 7


async def test_prompt_logprobs_have_the_shape_of_vllm(
    http: httpx2.AsyncClient, service: ServingContext
) -> None:
    prompts = ["Buzz Aldrin", "the Moon"]
    body = {"prompt": prompts, "n": 2, "prompt_logprobs": 2, "max_tokens": 2}
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    for choice, prompt in zip(choices, [one for one in prompts for _ in range(2)], strict=True):
        first, *others = choice["prompt_logprobs"]
        tokens = service.tokenizer.encode(prompt)
        assert first is None
        for token, entry in zip(tokens[1:], others, strict=True):
            assert next(iter(entry)) == str(token)
            assert entry[str(token)] == {
                "logprob": -0.25,
                "rank": 1,
                "decoded_token": service.tokenizer.decode([token]),
            }
            assert [one["rank"] for one in entry.values()] == [1, 2]
    chat = {"messages": [ASKED], "prompt_logprobs": 0, "max_tokens": 2}
    answer = (await http.post("/v1/chat/completions", json=chat)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_a_stream_has_no_prompt_logprobs(http: httpx2.AsyncClient) -> None:
    body = {"prompt": "Buzz", "prompt_logprobs": 2, "stream": True}
    refused = await http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


async def test_a_prompt_becomes_tokens_and_tokens_a_text(
    http: httpx2.AsyncClient, service: ServingContext
) -> None:
    text = "Buzz <|user|>Aldrin"
    found = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    ids = list(service.tokenizer.encode(text))
    assert found == {
        "count": len(ids),
        "max_model_len": 512,
        "tokens": ids,
        "token_strs": service.tokenizer.strings(ids),
    }
    back = await http.post("/detokenize", json={"tokens": found["tokens"]})
    assert back.json() == {"prompt": text}
    chat = (await http.post("/tokenize", json={"messages": [ASKED]})).json()
    assert chat["tokens"] == list(over_http(service, messages=[ASKED]).prompts[0])
    assert chat["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": [ASKED]}, 400),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404),
        ("/detokenize", {"tokens": [99_999]}, 400),
        ("/detokenize", {}, 400),
    ],
)
async def test_what_has_no_tokens_is_refused(
    http: httpx2.AsyncClient, path: str, body: dict[str, Any], status: int
) -> None:
    assert (await http.post(path, json=body)).status_code == status


async def test_the_version_is_that_of_the_package(http: httpx2.AsyncClient) -> None:
    version = importlib.metadata.version("speculative-cascades")
    assert (await http.get("/version")).json() == {"version": version}


async def test_metrics_need_a_key_like_everything_else(
    raw: Callable[..., httpx2.AsyncClient],
) -> None:
    metrics = PrometheusMetrics(ROUTER)
    http = raw(metrics=metrics.text, keys=Keys(["key"]))
    found = await http.get("/metrics", headers={"authorization": "Bearer key"})
    assert found.headers["content-type"].startswith("text/plain")
    assert "# TYPE cascade_answers_total counter" in found.text
    for path in ("/metrics", "/version"):
        assert (await http.get(path)).status_code == 401
    assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 401


async def test_pages_may_call_only_where_the_server_says_so(
    raw: Callable[..., httpx2.AsyncClient],
) -> None:
    origin = "https://chat.example.com"
    asks = {"origin": origin, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in (await raw().get("/livez", headers=asks)).headers
    http = raw(cors=Cors(allow_origins=(origin,)), keys=Keys(["key"]))
    preflight = await http.options("/v1/chat/completions", headers=asks)
    assert preflight.status_code == 200
    refused = await http.post("/v1/chat/completions", json={}, headers={"origin": origin})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    other = await http.get("/livez", headers={"origin": "https://other.example.com"})
    assert "access-control-allow-origin" not in other.headers
