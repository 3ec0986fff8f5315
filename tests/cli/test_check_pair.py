from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tests.support.vocabulary_pairs import llama_2_like, llama_like, make_pair, qwen_like
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.check_pair import check_pair
from cascade.cli.findings import Status

if TYPE_CHECKING:
    from pathlib import Path

PLENTY = 2**40


def test_a_pair_with_other_vocabularies_is_compared_and_tried(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, llama_2_like(), llama_like())

    found = check_pair(str(pair.drafter.path), str(pair.expert.path), free_bytes=PLENTY)

    overlap, estimate, tried = found
    assert overlap.status is Status.WARN
    assert "383 of the expert's 422 tokens are the drafter's too" in overlap.message
    assert "(vocabulary: tli)" in overlap.message
    shares = [int(one) for one in re.findall(r"(\d+)%", estimate.message)]
    assert 100 > shares[0] >= shares[1] > 0
    measured = re.search(r"(\d+) of (\d+) drafted tokens accepted", tried.message)
    assert measured is not None
    assert 0 < int(measured[1]) < int(measured[2])


def test_models_that_are_too_large_are_compared_only(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, qwen_like(), llama_like())

    *_, last = check_pair(str(pair.drafter.path), str(pair.expert.path), free_bytes=0)

    assert last.message.startswith("not tried")


def test_the_command_needs_both_models_and_says_what_is_wrong() -> None:
    result = CliRunner().invoke(app, ["doctor", "--pair", "demo", "/nowhere/at/all"])

    assert result.exit_code == 1
    assert "/nowhere/at/all" in result.output


def test_the_shipped_pair_shares_its_vocabulary() -> None:
    overlap, estimate, tried = check_pair("demo", "demo", free_bytes=0)

    assert overlap.message == "drafter and expert share their vocabulary"
    assert estimate.message.count("100%") == 2
    assert tried.status is Status.OK


@pytest.mark.slow
def test_the_shipped_pair_is_tried() -> None:
    *_, tried = check_pair("demo", "demo", free_bytes=PLENTY)

    assert "drafted tokens accepted" in tried.message
