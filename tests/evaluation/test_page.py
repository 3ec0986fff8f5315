"""The page of a measurement: escaped, aligned, and without a value that nobody can read."""

from __future__ import annotations

from cascade.evaluation.page import Figure, Finding, Page, Section, Table, provenance_table

TABLE = Table(
    title="Speeds",
    headings=("system", "ratio", "texts", "wanted", "none"),
    rows=(
        ("a <b>", "1.20 (1.10 to 1.31)", "1 of 4", "at least 1", ""),
        ("c", "-", "+0.1 [-2.0, 3e+03]", "2", ""),
    ),
    marked=frozenset({"c"}),
)


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    assert TABLE.is_numeric == (False, True, True, False, False)
    assert TABLE.markdown().splitlines()[3] == "| --- | ---: | ---: | --- | --- |"
    assert Table(title="t", headings=("a", "b"), rows=()).is_numeric == (False, False)


def test_a_page_has_the_sentence_the_figure_the_tables_and_the_provenance_in_this_order() -> None:
    page = Page(
        title="Title",
        findings=(Finding(headline="First.", detail="Then.", warning="Beware."),),
        sections=(
            Section(title="Curve", figures=(Figure(title="drawn", svg=b"<svg/>"),)),
            Section(title="Numbers", tables=(TABLE,), code="a: 1"),
        ),
        provenance=provenance_table({"command": "cascade evaluate", "none": ""}),
    ).html()
    order = ("First.", "Then.", "Beware.", 'alt="drawn"', "a: 1", "a &lt;b&gt;", "Provenance")
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    assert '<td class="number">1 of 4</td>' in page
    assert '<tr class="marked"><th scope="row">c</th>' in page
    assert "http" not in page


def test_nested_provenance_is_a_table_of_plain_values() -> None:
    about = {
        "command": "c",
        "versions": {"torch": "2"},
        "gpus": (),
        "cost_s": 0.123456,
        "a": [1, 2],
    }
    assert provenance_table(about).rows == (
        ("command", "c"),
        ("versions: torch", "2"),
        ("cost s", "0.123"),
        ("a", "1, 2"),
    )
