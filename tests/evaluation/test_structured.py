from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.evaluation_results import cell, make_results

from cascade.api.schema import ChatBody
from cascade.errors import InvalidMeasurement
from cascade.evaluation import report
from cascade.evaluation.client import connect_http, request_body
from cascade.evaluation.grid import GridBlock, merge_blocks
from cascade.evaluation.results import ALL, save
from cascade.evaluation.results import load as read_results
from cascade.evaluation.run import Run, evaluate
from cascade.evaluation.structured import ToolCall, score_calls, score_json
from cascade.evaluation.tasks import Split, StructuredFamily, split_of
from cascade.evaluation.tune import parse, tune, yaml_fragment
from cascade.evaluation.workloads import load
from cascade.types import Phase

if TYPE_CHECKING:
    from pathlib import Path

    from cascade.evaluation.client import InProcessClient

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a"],
    "additionalProperties": False,
}
RIGHT = '{"a": 1, "b": [2, 3]}'


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (tool("add", a={"type": "integer"}, b={"type": "integer"}), tool("now"))
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
NOW: dict[str, Any] = {"name": "now", "arguments": {}}


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, json.dumps(arguments))


@pytest.mark.parametrize(
    ("text", "quality", "valid", "fields"),
    [
        (RIGHT, 1, 1, 1),
        (' {"b": [2, 3.0],\n "a": 1} ', 1, 1, 1),
        ('{"a": 1, "b": [2]}', 0, 1, 2 / 3),
        ('{"a": 1, "b": [2, 3, 4]}', 0, 1, 1),
        ('{"a": 1}', 0, 1, 1 / 3),
        ('{"a": true, "b": [2, 3]}', 0, 0, 2 / 3),
        ('{"a": 1, "b": [2, 3], "c": 0}', 0, 0, 1),
        ('{"a": NaN}', 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
        (f"```json\n{RIGHT}\n```", 0, 0, 0),
        ("It is 1.", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_an_answer_is_valid_if_it_fits_and_right_if_every_field_is(
    text: str, quality: float, valid: float, fields: float
) -> None:
    score = score_json(text, [RIGHT], schema=SCHEMA, ended=True)
    assert (score.quality, score.valid, score.tool) == (quality, valid, None)
    assert score.fields == pytest.approx(fields)


def test_an_answer_that_was_cut_off_is_not_valid() -> None:
    """`2` of `26` is JSON too."""
    score = score_json("2", ["2"], schema={"type": "integer"}, ended=False)
    assert (score.quality, score.valid, score.fields) == (0, 0, 1)


def test_the_nearest_right_value_counts() -> None:
    score = score_json(RIGHT, ['{"a": 9}', RIGHT], schema=SCHEMA, ended=True)
    assert (score.quality, score.fields) == (1, 1)


def test_a_right_value_that_is_null_or_empty_is_one_field() -> None:
    for right, wrong in (("null", "0"), ("[]", "{}"), ("{}", "null")):
        assert score_json(right, [right], schema={}, ended=True).quality == 1
        assert score_json(wrong, [right], schema={}, ended=True).fields == 0


@pytest.mark.parametrize(
    ("calls", "right", "quality", "valid", "fields", "chosen"),
    [
        ([call("add", a=1, b=2)], [ADD], 1, 1, 1, 1),
        ([call("add", b=2, a=1)], [ADD], 1, 1, 1, 1),
        ([call("add", a=1, b=3)], [ADD], 0, 1, 1 / 2, 1),
        ([call("add", a=1, b="2")], [ADD], 0, 0, 1 / 2, 1),
        ([call("add", a=1)], [ADD], 0, 0, 1 / 2, 1),
        ([ToolCall("add", '{"a": 1, "b"')], [ADD], 0, 0, 0, 1),
        ([call("now")], [ADD], 0, 1, 0, 0),
        ([call("sub", a=1, b=2)], [ADD], 0, 0, 0, 0),
        ([call("add", a=1, b=2), call("now")], [ADD], 0, 1, 1, 0),
        ([], [ADD], 0, 0, 0, 0),
        ([call("now"), call("add", a=1, b=2)], [ADD, NOW], 1, 1, 1, 1),
        ([call("add", a=7, b=7), call("add", a=1, b=2)], [ADD], 0, 1, 1, 0),
        ([call("add", a=1, b=2)], [ADD, ADD], 0, 1, 1 / 2, 0),
        ([call("now")], [NOW], 1, 1, 1, 1),
        ([], [], 1, 1, 1, 1),
        ([call("now")], [], 0, 1, 0, 0),
    ],
)
def test_calls_are_scored_for_their_fit_their_tools_and_their_arguments(  # noqa: PLR0913, PLR0917 - columns of a table
    calls: list[ToolCall], right: list[Any], quality: float, valid: float, fields: float,
    chosen: float,
) -> None:  # fmt: skip
    score = score_calls(calls, [json.dumps(right)], tools=TOOLS, ended=True)
    assert (score.quality, score.valid, score.tool) == (quality, valid, chosen)
    assert score.fields == pytest.approx(fields)


def test_calls_of_an_answer_that_was_cut_off_are_not_valid() -> None:
    score = score_calls([call("now")], [json.dumps([NOW])], tools=TOOLS, ended=False)
    assert (score.quality, score.valid, score.tool) == (0, 0, 1)


@pytest.mark.parametrize("family", list(StructuredFamily))
def test_the_shipped_items_are_held_out_and_their_right_answers_score_1(
    family: StructuredFamily,
) -> None:
    workload = load(family, count=60)
    for item in workload.items:
        assert split_of(item.messages[-1].content) is Split.TEST
        (right,) = item.references
        if item.schema is not None:
            score = score_json(right, [right], schema=item.schema, ended=True)
        else:
            calls = [call(one["name"], **one["arguments"]) for one in json.loads(right)]
            score = score_calls(calls, [right], tools=item.tools, ended=True)
        assert score.quality == score.valid == score.fields == 1
        ChatBody.model_validate(request_body(item))
    assert workload.digest == load(family, count=60).digest


def test_free_items_come_once_more_without_a_grammar() -> None:
    workload = load("structured", count=3, free=True)
    assert workload.families == ("schemas", "tools", "schemas free", "tools free")
    assert len({item.name for item in workload.items}) == 12
    held, called, free, freely = (request_body(item) for item in workload.items[::3])
    assert held["response_format"]["json_schema"]["strict"]
    assert "response_format" not in free
    assert (called["tool_choice"], freely["tool_choice"]) == ("required", "auto")
    assert called["tools"] == freely["tools"]
    with pytest.raises(InvalidMeasurement, match="without --free"):
        load("facts", count=1, free=True)


LINE: dict[str, Any] = {
    "prompt": "1 and 2 and 3?", "scorer": "json", "schema": SCHEMA, "reference": json.loads(RIGHT),
}  # fmt: skip
CALLS: dict[str, Any] = {
    "prompt": "1 + 2?", "scorer": "calls", "tools": list(TOOLS), "reference": ADD,
}  # fmt: skip


def written(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_a_file_has_schemas_and_tools_with_their_right_answers(tmp_path: Path) -> None:
    strict = {**TOOLS[1], "function": {**TOOLS[1]["function"], "strict": True}}
    both = {
        "prompt": "1 + 2, and when?", "scorer": "calls", "tools": [TOOLS[0], strict],
        "tool_choice": "auto", "references": [[ADD, NOW], []],
    }  # fmt: skip
    null = LINE | {"schema": {}, "reference": None}
    items = load(written(tmp_path, LINE, CALLS, both, null), free=True).items
    assert items[0].schema == SCHEMA
    assert json.loads(items[0].references[0]) == json.loads(RIGHT)
    one, several = (request_body(item) for item in items[1:3])
    assert (one["tool_choice"], one["parallel_tool_calls"]) == ("required", False)
    assert (several["tool_choice"], several["parallel_tool_calls"]) == ("auto", True)
    assert several["tools"][1]["function"]["strict"]
    assert "strict" not in request_body(items[6])["tools"][1]["function"]
    assert items[3].references == ("null",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE | {"schema": {"type": "number?"}}, "`schema` is no JSON schema: 'number\\?'"),
        (LINE | {"reference": {"a": "x"}}, "reference.*'x' is not of type 'integer'"),
        (LINE | {"scorer": "number"}, "scorer `json` and `schema` go together"),
        (LINE | {"schema": None}, "scorer `json` and `schema` go together"),
        (LINE | {"tools": list(TOOLS)}, "scorer `calls` and `tools` go together"),
        (LINE | {"completion": True}, "`completion` wants no `schema`"),
        (CALLS | {"tools": []}, "`tools` is \\[\\]; .*at least 1"),
        (CALLS | {"tools": [{"type": "function"}]}, "`tools` has an invalid one: `function`"),
        (CALLS | {"tools": [tool("add", a={"type": 3})]}, "`tools` has an invalid one: 3 is not"),
        (CALLS | {"reference": {"name": "ad"}}, "no tool `ad`; .*did you mean `add`"),
        (CALLS | {"reference": {"name": "add"}}, "'a' is a required property"),
        (CALLS | {"reference": "add"}, "reference .add.*valid dictionary"),
        (CALLS | {"tool_choice": "none"}, "`tool_choice` is .none"),
        ({"prompt": "2 + 2?", "scorer": "number", "reference": 4}, "compares text"),
    ],
)
def test_the_error_for_an_invalid_structure_says_what_is_wrong(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidMeasurement, match=message):
        load(written(tmp_path, line))


async def test_both_clients_read_the_same_calls(shipped: InProcessClient, shipped_url: str) -> None:
    (item,) = load("tools", count=1).items
    body = request_body(item, seed=1, temperature=0, cascade={"mode": "drafter_only"})
    in_process = await shipped.complete(body)
    async with connect_http(shipped_url) as server:
        over_http = await server.complete(body)
    assert in_process.calls == over_http.calls
    assert in_process.text == over_http.text == ""
    assert in_process.finish_reason == over_http.finish_reason == "tool_calls"
    assert 0 < over_http.ttft_s <= over_http.latency_s
    (made,) = over_http.calls
    assert made.name in {"add", "subtract", "capital", "currency"}
    json.loads(made.arguments)


async def test_schemas_and_tools_are_evaluated_with_and_without_a_grammar(
    shipped: InProcessClient, tmp_path: Path
) -> None:
    """A grammar makes every answer that ends valid; the shipped pair calls no tools by itself."""
    items = load("structured", count=1, free=True)
    block = GridBlock(curves={"token_v3": [0.9]}, phases={Phase.TOOL: "lossless"})
    settings, run = merge_blocks([block]), Run(folder=tmp_path)
    run.open_store(items, shipped).write_costs({})  # what a pass costs is measured elsewhere
    found = await evaluate(items, settings, shipped, run=run)
    cascade = found.cells[-1]
    assert cascade.setting.name == "token_v3 0.9, tool lossless"
    for family, valid in (("schemas", 100), ("tools", 100), ("tools free", 0)):
        assert found.metrics[family].estimate(cascade, "valid").value == valid
    headings = {
        family: set(report.settings_table(found, family, temperature=0).headings)
        for family in found.groups
    }
    assert {"valid", "fields right", "tool right"} <= headings["tools"] & headings[ALL]
    assert "tool right" not in headings["schemas"]
    save(found, tmp_path / "results.json", figures=report.estimates(found))
    assert [one.setting for one in read_results(tmp_path).cells] == settings


def test_a_mean_is_of_the_items_that_have_a_value() -> None:
    valid = [1.0, 0.0, float("nan"), float("nan")]
    found = make_results(cells=[cell("chow", dial=0.1, valid=valid)], families="aabb")
    one = found.cells[-1]
    assert found.metrics["a"].estimate(one, "valid").value == 50
    assert found.metrics[ALL].estimate(one, "valid").value == 50
    assert not found.metrics["b"].has([one], "valid")
    with pytest.raises(InvalidMeasurement, match=r"no `tool`.*schema or tools"):
        tune(found, [parse("tool >= 50")], group="a")


def test_a_target_may_bound_validity_and_phases_are_said_beside_the_defaults() -> None:
    names = ("expert_only", "drafter_only", "lossless")
    baselines = [cell(name, valid=[float(name != "drafter_only")] * 4) for name in names]
    setting = merge_blocks([GridBlock(curves={"chow": [0.1]}, phases={Phase.TOOL: "lossy 0.3"})])[
        -1
    ]
    chosen = replace(cell("chow", valid=[1.0] * 4, expert_passes=[3.0] * 4), setting=setting)
    found = make_results(cells=[*baselines, chosen], families="aaaa")
    choice = tune(found, [parse("valid >= expert"), parse("expert_passes <= 30%")], group="a")
    assert choice.setting == setting
    text = yaml_fragment(choice, found)
    assert '# send `cascade.phases` with each request: {"tool": {"kind": "lossy"' in text
