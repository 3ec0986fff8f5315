from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks import Scorer, Split, TaskFamily, split_of
from cascade.evaluation.workloads import Message, Workload, load

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '{"prompt": "2 + 2?", "reference": "4", "scorer": "number"}'

CHAT = (
    '{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},'
    ' {"role": "user", "content": "Rome?"}], "references": ["Italy", "In Italy"],'
    ' "scorer": "match", "system": "Be short.", "max_tokens": 9, "family": "places", "id": "x"}'
)


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(InvalidMeasurement) as caught:
        load(written(folder, text))
    return caught.value.message


def test_a_file_of_two_lines_is_a_workload(tmp_path: Path) -> None:
    workload = load(written(tmp_path, f"{GOOD}\n\n{CHAT}\n"))
    plain, chat = workload.items
    assert workload.families == ("mine", "places")
    assert (plain.name, plain.scorer, plain.max_tokens) == ("mine/1", Scorer.NUMBER, 256)
    assert plain.messages == (Message(role="user", content="2 + 2?"),)
    assert (chat.name, chat.references, chat.max_tokens) == ("places/x", ("Italy", "In Italy"), 9)
    assert [turn.role for turn in chat.messages] == ["system", "user", "assistant", "user"]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    assert len(load(written(tmp_path, f"\ufeff{GOOD}\r\n{CHAT}\r\n")).items) == 2


def test_a_text_can_be_continued_instead_of_answered(tmp_path: Path) -> None:
    line = GOOD.replace("}", ', "completion": true}')
    assert load(written(tmp_path, line)).items[0].completion


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (GOOD.replace("number", "blue"), ["`scorer`", '"blue"', "bigrams", "bleu", "program"]),
        (GOOD.replace(', "scorer": "number"', ""), ["`scorer` is missing"]),
        (GOOD.replace('"2 + 2?"', "4"), ["`prompt", "is 4", "valid string"]),
        (GOOD.replace('"2 + 2?"', '""'), ["`prompt", 'is ""', "at least 1 character"]),
        (GOOD.replace('"2 + 2?"', "[]"), ["`prompt", "is []", "at least 1"]),
        (GOOD.replace('"2 + 2?"', '[{"role": "robot", "content": ""}]'), ["role", '"robot"']),
        (GOOD.replace('"reference": "4"', '"references": []'), ["`references` is []"]),
        (GOOD.replace('"reference": "4", ', ""), ["wanted `reference` or `references`, got none"]),
        (GOOD.replace("}", ', "references": ["4"]}'), ["got both"]),
        (GOOD.replace("}", ', "max_tokens": "9"}'), ['`max_tokens` is "9"', "valid integer"]),
        (GOOD.replace("}", ', "max_tokens": 0}'), ["`max_tokens` is 0", "greater than 0"]),
        (GOOD.replace("}", ', "answer": "4"}'), ["`answer` is unknown", "reference"]),
        (GOOD.replace("}", ', "completion": true, "system": ""}'), ["`completion` wants"]),
        (GOOD[:-1], ["Invalid JSON"]),
        ("[1]", ["object", "[1]"]),
        ("four", ["Invalid JSON"]),
    ],
)
def test_the_error_for_an_invalid_line_says_what_is_wrong(
    tmp_path: Path, line: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, f"{GOOD}\n{line}\n")
    assert "mine.jsonl" in message
    assert "line 2" in message
    assert "line 1:" not in message
    for part in parts:
        assert part in message


def test_the_error_lists_at_most_ten_invalid_lines(tmp_path: Path) -> None:
    message = refusal(tmp_path, "\n".join(["{}"] * 30))
    assert "line 10:" in message
    assert "line 11:" not in message
    assert "20 more" in message


def test_the_error_for_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert "line 2: byte 0xe9 is no UTF-8" in message


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_the_error_for_an_empty_file_has_an_example(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert "is empty" in message
    assert '"scorer": "number"' in message


def test_a_duplicate_id_is_refused(tmp_path: Path) -> None:
    line = GOOD.replace("}", ', "id": "a"}')
    assert "'a' comes twice" in refusal(tmp_path, f"{line}\n{line}")


def test_the_error_for_a_missing_file_lists_the_families() -> None:
    with pytest.raises(InvalidMeasurement, match=r"nowhere.jsonl cannot be read.*families.*facts"):
        load("nowhere.jsonl")


def test_the_families_are_held_out_items() -> None:
    workload = load("families", count=3)
    assert workload.families == tuple(TaskFamily)
    assert len(workload.items) == 3 * len(TaskFamily)
    assert len({item.name for item in workload.items}) == len(workload.items)
    assert {split_of(item.messages[0].content) for item in workload.items} == {Split.TEST}


def test_one_family_can_be_drawn_with_another_seed() -> None:
    first, second = (load("facts", count=2, seed=seed) for seed in (0, 1))
    assert first.families == ("facts",)
    assert first.digest != second.digest
    assert first.digest == load("facts", count=2).digest


def test_some_families_are_named_with_commas_and_each_counts_once() -> None:
    workload = load("reports,facts,reports", count=2)
    assert workload.families == ("reports", "facts")
    assert len(workload.items) == 4


def test_more_items_than_a_family_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.evaluation.tasks.generate._MAX_REPEATS", 20)
    with pytest.raises(InvalidMeasurement, match="ask for fewer"):
        load("facts", count=100_000)


def test_a_count_keeps_the_first_items_of_each_family(tmp_path: Path) -> None:
    lines = [GOOD.replace("}", f', "family": "{name}"}}') for name in "aabab"]
    kept: Workload = load(written(tmp_path, "\n".join(lines)), count=1)
    assert [item.name for item in kept.items] == ["a/1", "b/3"]
