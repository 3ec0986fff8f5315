from __future__ import annotations

from pathlib import Path

import pytest
from tests.sweep.sweep import ENCODING, MORE, TEXT, Row, model_types, page, read_rows, sweep_type

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = ("llama", "mistral", "gemma", "qwen", "phi", "deepseek", "t5", "bart", "mamba")


def test_the_page_of_models_names_the_installed_types_of_some_families() -> None:
    rows = read_rows(PAGE)
    installed = {one for one in model_types() if one[0].startswith(FAMILIES)}
    assert len(installed) > len(FAMILIES)
    assert installed <= set(rows)


def test_the_page_of_models_says_of_no_type_that_it_is_served_wrongly() -> None:
    texts = [row.text for row in read_rows(PAGE).values()]
    assert {text.split()[0].rstrip(":,") for text in texts} <= {"served", "refused", "not"}


@pytest.mark.parametrize(
    ("kind", "group", "text"),
    [
        ("llama", TEXT, "served, lean path"),
        ("gemma2", TEXT, "served, flat path"),
        (
            "mamba",
            TEXT,
            "refused: MambaForCausalLM keeps a recurrent state, which cannot be rolled",
        ),
        ("mistral3", MORE, "served, flat path"),
        ("t5", ENCODING, "served, encoder-decoder path"),
    ],
)
def test_a_tiny_model_of_a_type_is_served_or_refused(kind: str, group: str, text: str) -> None:
    assert sweep_type(kind, group).text.startswith(text)


def test_a_page_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = {("a", TEXT): Row("A", "served, flat path"), ("b", MORE): Row("", "refused: no")}
    (tmp_path / "models.md").write_text(page(rows), encoding="utf-8")
    assert read_rows(tmp_path / "models.md") == rows
