"""What users build on stays: commands, settings, messages, metrics, routes and answers.

`public_surface.json` is a record of all that. What is recorded must be there and be equal; more may
be there. So new options, settings, metrics, fields and routes pass, and new required ones do not.
Commands of the READMEs and YAMLs of `cluster/` are not compared but tried: those that once stood
there must still be accepted.

`python -m tests.test_public_surface` writes the record anew: after an addition, so that it is
guarded too, or when something is taken away on purpose.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from enum import Enum
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeAlias, get_args
from urllib.parse import urlsplit

import pytest
import yaml
from fastapi.testclient import TestClient
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.json_format import MessageToDict
from pydantic import TypeAdapter
from tests.support.scripted_generator import ScriptedGenerator
from typer.main import get_command

from cascade.api.http import create_app
from cascade.app import build
from cascade.cli import app as command_line
from cascade.observability.metric_specs import ENGINE, ROUTER
from cascade.settings import Application
from cascade.v1 import cascade_pb2, drafter_pb2, expert_pb2, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Json: TypeAlias = dict[str, Any]
Entries: TypeAlias = "Iterator[tuple[str, Any]]"

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("public_surface.json")
RECORDED: Json = json.loads(RECORD.read_text()) if RECORD.exists() else {}
SETTINGS: TypeAdapter[Any] = TypeAdapter(Application)
POLICY = "cascade.operations.autoscaling:TierPolicy"  # running clusters know it by this name
RPCS = ("Generate", "GenerateStream", "ListModels", "Check")
CODE = re.compile(r"```(?:console|shell|bash|sh)\n(.*?)```", re.DOTALL)
FILE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)+")
ASKED: Json = {"return_token_ids": True, "stop": "eleven", "cascade": {"trace": True}}
CHAT: Json = {"messages": [{"role": "user", "content": "Who?"}], "logprobs": True}
TEXT: Json = {"prompt": "Who?", "logprobs": 1}
RESPONSE: Json = {"input": "Who?", "return_token_ids": False}
STREAM: Json = {"stream": True, "stream_options": {"include_usage": True}}
JSON_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}


def readme_commands() -> Json:
    """Return the words of each command in the READMEs' blocks of code."""
    found: Json = {}
    for name in ("README.md", "cluster/README.md"):
        for block in CODE.findall((ROOT / name).read_text()):
            lines = re.sub(r"\\\n|\s#.*", " ", block)
            lexer = shlex.shlex(lines, posix=True, punctuation_chars="&\n")
            lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
            for is_end, part in groupby(lexer, lambda word: set(word) <= {"&", "\n"}):
                words = list(part)
                found |= {} if is_end else {shlex.join(words): words}
    return found


def cluster_files() -> Json:
    """Return the name of each file, and what the YAMLs say."""
    found: Json = {}
    for path in (ROOT / "cluster").rglob("*"):
        documents = yaml.safe_load_all(path.read_text()) if path.suffix == ".yaml" else [None]
        told = next(iter(documents))
        found |= {} if path.is_dir() else {path.relative_to(ROOT).as_posix(): told}
    return found


def cli() -> Json:
    """Return each command with what it requires, each option and argument, and each choice."""
    return dict(parameters(get_command(command_line), "cascade"))


def parameters(command: Any, path: str) -> Entries:
    arguments = [one.name for one in command.params if one.param_type_name == "argument"]
    required = sorted(one.name for one in command.params if one.required)
    yield path, {"arguments": arguments, "required": required}
    for name, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, f"{path} {name}")
    told = ("name", "secondary_opts", "default", "multiple", "nargs", "envvar", "min", "max")
    for one in command.params:
        kind = one.type_descriptor.annotation
        kind = get_args(kind)[0] if get_args(kind) else kind
        choices = [choice.value for choice in kind] if issubclass(kind, Enum) else []
        label = "choice" if choices else kind.__name__
        for word in one.opts:
            yield f"{path} {word}", {"type": label, **{name: getattr(one, name) for name in told}}
            yield from ((f"{path} {word}={choice}", True) for choice in choices)


def settings() -> Json:
    """Return each key of the YAML with its bounds, and what holds where nothing is written."""
    unwritten = SETTINGS.dump_python(SETTINGS.validate_python({}), mode="json")
    schema = SETTINGS.json_schema()
    return shape(schema, schema["$defs"], "args") | dict(leaves(unwritten, "unwritten"))


def leaves(value: Any, path: str) -> Entries:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    else:
        yield path, value


def shape(schema: Json, definitions: Json, path: str) -> Json:
    """Return what a JSON schema allows: for each path and type the bounds.

    Names of definitions are left out: it does not matter which class describes a branch.
    """
    found: dict[str, list[Any]] = {}
    for key, value in allowed(schema, definitions, path):
        if value not in found.setdefault(key, []):
            found[key].append(value)
    return found


def allowed(schema: Json, definitions: Json, path: str) -> Entries:
    if isinstance(schema.get("default"), str | int | float):
        yield f"{path} default", schema["default"]
    for one in alternatives(schema, definitions):
        properties: Json = one.pop("properties", {})
        rule = properties.get("kind", {}).get("const")
        here = path if rule is None else f"{path}({rule})"
        inner = {f"{here}.{name}": part for name, part in properties.items()}
        if "items" in one:
            inner[f"{here}[]"] = one.pop("items")
        if isinstance(one.get("additionalProperties"), dict):
            inner[f"{here}.*"] = one.pop("additionalProperties")
        if "required" in one:
            one["required"] = sorted(one["required"])
        kind = one.pop("type", "anything")
        label = json.dumps(one.pop("const")) if "const" in one else kind
        yield f"{here}: {label}", one
        for name, part in inner.items():
            yield from allowed(part, definitions, name)


def alternatives(schema: Json, definitions: Json) -> Iterator[Json]:
    """Yield each kind of value that a schema allows, without references and prose."""
    prose = {"title", "description", "default", "discriminator", "$defs"}
    common = {name: value for name, value in schema.items() if name not in prose}
    choices = [*common.pop("anyOf", ()), *common.pop("oneOf", ())]
    choices += [{"const": value} for value in common.pop("enum", ())]
    if "$ref" in common:
        choices.append(definitions[common.pop("$ref").rpartition("/")[2]])
    if isinstance(common.get("type"), list):
        choices += [{"type": kind} for kind in common.pop("type")]
    if not choices:
        yield common
    for choice in choices:
        yield from (common | one for one in alternatives(choice, definitions))


def protos() -> Json:
    """Return each RPC, message, field and enum value."""
    found: Json = {}
    for module in (cascade_pb2, drafter_pb2, expert_pb2, tokens_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        told = MessageToDict(file)
        for service in told.get("service", ()):
            for method in service["method"]:
                found[f"rpc {told['package']}.{service['name']}.{method['name']}"] = method
        found |= dict(messages(told, told["package"]))
    return found


def messages(told: Json, path: str) -> Entries:
    for enum in told.get("enumType", ()):
        for value in enum["value"]:
            yield f"enum {path}.{enum['name']}.{value['name']}", value.get("number", 0)
    for message in (*told.get("messageType", ()), *told.get("nestedType", ())):
        here = f"{path}.{message['name']}"
        yield f"message {here}", True
        for field in message.get("field", ()):
            if "oneofIndex" in field:
                field["oneof"] = message["oneofDecl"][field.pop("oneofIndex")]["name"]
            yield f"field {here}.{field['name']}", field
        yield from messages(message, here)


def metrics() -> Json:
    return {
        m.name: {"kind": m.kind, "labels": m.labels, "buckets": m.buckets}
        for m in (*ROUTER, *ENGINE)
    }


def openapi() -> Json:
    """Return each operation with what it takes and what it says it answers."""
    document = create_app().openapi()
    definitions, found = document["components"]["schemas"], dict[str, Any]()
    for path, operations in document["paths"].items():
        for method, told in operations.items():
            here = f"{method.upper()} {path}"
            for one in told.get("parameters", ()):
                name = f"{here} {one['in']} {one['name']}"
                found |= {name: one["required"], **shape(one["schema"], definitions, name)}
            for side, part in {"body": told.get("requestBody", {}), **told["responses"]}.items():
                for kind, content in part.get("content", {}).items():
                    found |= shape(content["schema"], definitions, f"{here} {side} {kind}")
    return found


def usage_cascade() -> Json:
    """Return each field of real answers, `cascade` objects included: OpenAPI tells no answers."""
    client, found = door(), dict[str, Any]()
    for path in ("/health", "/v1/models", "/v1/models/cascade", "/v1/models/absent"):
        found |= dict(fields(client.get(path).json(), f"GET {path}"))
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", TEXT),
        ("/v1/responses", RESPONSE),
    ):
        whole, stream = (client.post(path, json=ASKED | body | more) for more in ({}, STREAM))
        found |= dict(fields(whole.json(), f"POST {path}"))
        for event in re.findall(r"^data: ({.*})$", stream.text, re.MULTILINE):
            found |= dict(fields(json.loads(event), f"POST {path} event"))
    return found


def door() -> TestClient:
    """Return a client of the HTTP door; what stands behind it needs no model to write."""
    tree = Application()
    pair = tree.pair()
    words = pair.tokenizer.encode("Buzz Aldrin walked on the Moon, and so did eleven others.")
    return TestClient(
        create_app(tree.serving_context(ScriptedGenerator(script=lambda _: words), pair))
    )


def fields(value: Any, path: str) -> Entries:
    yield f"{path}: {JSON_NAMES.get(type(value), 'number')}", True
    if isinstance(value, dict):
        by_token = path.endswith(".top_logprobs[]") and "token" not in value
        for name, inner in value.items():
            yield from fields(inner, f"{path}.{'*' if by_token else name}")
    for inner in value if isinstance(value, list) else ():
        yield from fields(inner, f"{path}[]")


def http_routes() -> Json:
    """Return the routes; and as Serve has them, the names of the deployments and the RPCs."""
    app: Any = create_app()
    routes = [(one, getattr(one, "methods", None) or ()) for one in app.routes]
    served: Any = build(Application())
    router = served._bound_deployment
    tiers = [one._bound_deployment for one in router.init_args[1:]]
    return {
        **{f"{way} {one.path}": True for one, ways in routes for way in ways if way != "HEAD"},
        **{f"deployment {one.name}": True for one in (router, *tiers)},
        **{f"gRPC {name}": callable(getattr(router.func_or_class, name, None)) for name in RPCS},
    }


def entry_points() -> Json:
    """Return the console scripts, and whether what is imported by its name is there."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    places = {"cascade.app:build": "cascade.app:build", POLICY: POLICY}
    places |= {f"script {name}": place for name, place in scripts.items()}
    return {name: callable(resolve_name(place)) for name, place in places.items()}


TRIED = (readme_commands, cluster_files)
COMPARED = (cli, settings, protos, metrics, openapi, usage_cascade, http_routes, entry_points)


@pytest.mark.parametrize("section", COMPARED, ids=lambda section: section.__name__)
def test_all_that_was_recorded_is_there_and_the_same(section: Callable[[], Json]) -> None:
    now = json.loads(json.dumps(section(), default=str))
    changed = [
        f"{key}\n  recorded: {value}\n  now:      {now.get(key, 'nothing')}"
        for key, value in RECORDED[section.__name__].items()
        if key not in now or now[key] != value
    ]
    if changed:
        pytest.fail("\n".join(changed))


@pytest.mark.parametrize("line", RECORDED.get("readme_commands", ()))
def test_a_command_that_stood_in_a_readme_is_still_accepted(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_LEASE_TOKEN", "secret")
    program, *words = RECORDED["readme_commands"][line]
    names = [word for word in words if FILE_NAME.fullmatch(word)]
    assert [name for name in names if not (ROOT / name).exists()] == []
    if program == "cascade":
        command = get_command(command_line)
        while inner := getattr(command, "commands", None):
            command = inner[words.pop(0)]
        command.make_context(command.name, words)
    if program == "curl":
        path = next(urlsplit(word).path for word in words if word.startswith("http"))
        assert door().post(path, content=words[words.index("-d") + 1]).is_success


@pytest.mark.parametrize("name", RECORDED.get("cluster_files", ()))
def test_a_file_that_stood_in_the_cluster_folder_is_there_and_still_accepted(name: str) -> None:
    """A YAML is accepted as it was recorded, whatever it says today."""
    assert (ROOT / name).exists()
    told: Json = RECORDED["cluster_files"][name] or {}
    told = yaml.safe_load(told.get("spec", {}).get("serveConfigV2", "null")) or told
    for place in told.get("grpc_options", {}).get("grpc_servicer_functions", ()):
        assert callable(resolve_name(place))
    for one in told.get("applications", ()):
        assert callable(resolve_name(one["import_path"]))
        understood = SETTINGS.dump_python(SETTINGS.validate_python(one["args"]), mode="json")
        written, found = (dict(leaves(tree, "args")) for tree in (one["args"], understood))
        assert {key: found.get(key) for key in written} == written


def test_the_scaling_policy_takes_the_targets_that_running_clusters_give_it() -> None:
    resolve_name(POLICY)(wait_s=0.2, backlog=1.0, cache=0.8, busy=0.9, sessions=48.0)


def line_by_line(value: Any, depth: int = 2) -> str:
    if not depth:
        return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)
    lines = [f"{json.dumps(key)}: {line_by_line(value[key], depth - 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    RECORD.write_text(line_by_line({one.__name__: one() for one in (*TRIED, *COMPARED)}) + "\n")
