"""`cascade bench judge`."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from cascade.benchmark import judging
from cascade.cli import app


def judge(*words: str) -> str:
    ended = CliRunner().invoke(app, ["bench", "judge", *words], env={"COLUMNS": "200"})
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_judging_is_timed_for_each_vocabulary_shape_sampling_and_rule() -> None:
    words = "--vocabulary 2000 --vocabulary 3000 --shape trained --rule opt --rule lossless"
    output = judge(*words.split(), "--repeats", "1", "--sampling", "top_p 0.9")
    lines = output.splitlines()
    assert lines[0] == "| vocabulary | logits | sampling | opt | lossless |"
    rows = [
        re.fullmatch(r"\| (\d+) \| trained \| top_p 0.9 \| [\d.]+ \| [\d.]+ \|", line)
        for line in lines[2:]
    ]
    assert [row and row[1] for row in rows] == ["2000", "3000"]


def test_a_name_that_is_unknown_is_answered_with_those_that_are() -> None:
    ended = CliRunner().invoke(app, ["bench", "judge", "--rule", "opd"])
    assert ended.exit_code == 2
    assert "--rule is 'opd'" in ended.output
    assert "opt" in ended.output


@pytest.mark.slow
def test_the_pass_of_a_model_is_timed_beside_it() -> None:
    words = "--vocabulary 262144 --shape trained --rule opt --repeats 2 --model-pass"
    assert "262144 tokens: " in judge(*words.split(), "--sampling", "top_p 0.9")


def test_every_rule_judges_blocks_of_every_shape() -> None:
    found = judging.measure(
        vocabularies=[1500],
        shapes=list(judging.SHAPES),
        samplings=list(judging.SAMPLINGS),
        rules=list(judging.RULES),
        repeats=1,
        cores=0,
    )
    assert all(ms > 0 for one in found for ms in one.by_rule.values())
