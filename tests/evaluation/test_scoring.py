from __future__ import annotations

from typing import Any

import pytest

from cascade.errors import InvalidMeasurement
from cascade.evaluation import scoring
from cascade.evaluation.scoring import (
    corpus_bleu,
    import_extra,
    last_number,
    rouge_2,
    score,
    words,
)
from cascade.evaluation.tasks import Scorer

PROGRAM = "def twice(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("scorer", "answer", "references", "quality"),
    [
        (Scorer.EXACT, " Rome \n", ["Paris", "Rome"], 1),
        (Scorer.EXACT, "rome", ["Rome"], 0),
        (Scorer.MATCH, "The rome.", ["Paris", "Rome"], 1),
        (Scorer.MATCH, "Rome, Italy", ["Rome"], 0),
        (Scorer.CONTAINS, "It is the city of New York.", ["new york"], 1),
        (Scorer.CONTAINS, "It is York, the new.", ["new york"], 0),
        (Scorer.NUMBER, "2 + 2 = 4", ["5", "4"], 1),
        (Scorer.NUMBER, "none", ["4"], 0),
        (Scorer.BIGRAMS, "a fire broke out", ["no", "a fire broke out"], 1),
        (Scorer.BIGRAMS, "a fire broke out", ["a fire broke down"], 2 / 3),
        (Scorer.BLEU, "le trois mai", ["le trois mai"], 1),
        (Scorer.BLEU, "", ["le trois mai"], 0),
        (Scorer.PROGRAM, PROGRAM, ["assert twice(2) == 4"], 1),
        (Scorer.PROGRAM, PROGRAM, ["assert twice(2) == 4", "assert twice(2) == 5"], 0),
        (Scorer.PROGRAM, f" {PROGRAM}", ["assert twice(2) == 4"], 1),
    ],
)
def test_each_scorer_tells_right_from_wrong(
    scorer: Scorer, answer: str, references: list[str], quality: float
) -> None:
    assert score(scorer, answer, references) == pytest.approx(quality)


def test_the_module_docstring_describes_every_scorer() -> None:
    assert all(f"`{scorer}`" in (scoring.__doc__ or "") for scorer in Scorer)


def test_the_bleu_of_a_nearly_right_sentence_is_between_0_and_1() -> None:
    near = score(Scorer.BLEU, "je vois le chat noir", ["je vois le chat blanc"])
    assert 0.5 < near < 1


def test_items_of_a_corpus_may_have_different_numbers_of_references() -> None:
    answers = ["je vois le chat noir", "il fait beau ce matin"]
    references = [["je vois le chat noir"], ["il pleut", "il fait beau ce matin"]]
    assert corpus_bleu(answers, references) == pytest.approx(100)
    assert corpus_bleu(answers, [references[0], ["il fait froid ce soir"]]) < 70


def test_the_error_for_a_missing_package_says_how_to_install_it(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(InvalidMeasurement, match=r"pip install 'speculative-cascades\[lab\]'"):
        import_extra("sacrebleu")


def test_only_the_last_number_counts() -> None:
    assert last_number("3 + 4 = 7. The answer is 7.") == "7"
    assert last_number("2 - 5 = -3") == "-3"
    assert last_number("none") is None


def test_matching_ignores_case_articles_and_punctuation() -> None:
    assert words("The capital, of Peru!") == words("capital of peru")


def test_rouge_2_counts_shared_pairs() -> None:
    """Three of three pairs against three of four: F1 = 2 * 3 / (3 + 4)."""
    assert rouge_2("a b c d", "a b c d e") == pytest.approx(6 / 7)
    assert rouge_2("one", "one") == 0
