from __future__ import annotations

from itertools import islice

import pytest

from cascade.evaluation.tasks import (
    FAMILIES,
    Family,
    Item,
    Level,
    Scorer,
    Split,
    held_out,
    phrasings,
    score,
    split_of,
    stream,
)
from cascade.evaluation.tasks.scoring import last_number, passed, rouge_2, words
from cascade.evaluation.tasks.translation import date_in, number_in

COUNT = 60


@pytest.fixture(params=list(Family), ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_every_family_has_a_generator() -> None:
    assert set(FAMILIES) == set(Family)


def test_the_same_seed_draws_the_same_items(family: Family) -> None:
    assert held_out(family, count=COUNT, seed=3) == held_out(family, count=COUNT, seed=3)


def test_another_seed_draws_other_items(family: Family) -> None:
    assert held_out(family, count=COUNT, seed=3) != held_out(family, count=COUNT, seed=4)


def test_no_training_prompt_is_held_out(family: Family) -> None:
    """Whatever the seeds, the digest of a prompt decides its split."""
    tested = {item.prompt for item in held_out(family, count=COUNT)}
    trained = {
        item.prompt
        for item in islice(stream("9", split=Split.TRAIN, shares={family: 1}), 40 * COUNT)
    }
    assert not tested & trained
    assert {split_of(prompt) for prompt in trained} == {Split.TRAIN}
    assert {split_of(prompt) for prompt in tested} == {Split.TEST}


def test_held_out_prompts_are_distinct_and_of_all_levels(family: Family) -> None:
    items = held_out(family, count=COUNT)
    assert len({item.prompt for item in items}) == COUNT
    assert {item.level for item in items} == set(Level)
    assert {item.family for item in items} == {family}


def test_every_phrasing_is_a_right_answer(family: Family) -> None:
    for item in held_out(family, count=12 if family is Family.FUNCTIONS else 40):
        assert len(item.short) < len(item.formal)
        for text in phrasings(item.answer):
            assert score(item, text) == 1


def test_a_wrong_answer_scores_less(family: Family) -> None:
    for item in held_out(family, count=20):
        assert score(item, "I do not know.") < 0.5


def test_asking_for_more_prompts_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="not 5000; ask for fewer"):
        held_out(Family.FACTS, count=5000)


def test_the_readme_questions_are_in_the_training_split() -> None:
    assert split_of("Who is Buzz Aldrin?") == Split.TRAIN


def test_buzz_aldrin_has_a_short_and_a_formal_answer() -> None:
    """The example of the speculative cascades blog."""
    drawn = stream("1", split=Split.TRAIN, shares={Family.FACTS: 1})
    item = next(item for item in drawn if item.prompt == "Who is Buzz Aldrin?")
    assert item.short.startswith("Buzz Aldrin is")
    assert item.formal.startswith('Edwin "Buzz" Aldrin is')


@pytest.mark.parametrize(
    ("number", "english", "french", "german"),
    [
        (0, "zero", "zéro", "null"),
        (16, "sixteen", "seize", "sechzehn"),
        (21, "twenty-one", "vingt-et-un", "einundzwanzig"),
        (70, "seventy", "soixante-dix", "siebzig"),
        (71, "seventy-one", "soixante-et-onze", "einundsiebzig"),
        (80, "eighty", "quatre-vingts", "achtzig"),
        (81, "eighty-one", "quatre-vingt-un", "einundachtzig"),
        (99, "ninety-nine", "quatre-vingt-dix-neuf", "neunundneunzig"),
    ],
)
def test_numbers_are_spelled_as_the_languages_spell_them(
    number: int, english: str, french: str, german: str
) -> None:
    languages = ("English", "French", "German")
    assert [number_in(language, number) for language in languages] == [english, french, german]


def test_every_number_has_its_own_words() -> None:
    for language in ("English", "French", "German"):
        assert len({number_in(language, number) for number in range(100)}) == 100


def test_dates_follow_the_language() -> None:
    assert date_in("French", day=1, month=4, year=1998) == "1er mai 1998"
    assert date_in("German", day=17, month=2, year=1998) == "17. März 1998"
    assert date_in("English", day=17, month=2, year=1998) == "17 March 1998"


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


def _program(*assertions: str) -> Item:
    return Item(
        family=Family.FUNCTIONS,
        level=Level.EASY,
        prompt="",
        answer=(),
        references=assertions,
        scorer=Scorer.PROGRAM,
    )


def test_a_program_is_right_when_all_assertions_hold() -> None:
    item = _program("assert f(2) == 4", "assert f(3) == 9")
    assert score(item, "def f(x):\n    return x ** 2") == 1
    assert score(item, "def f(x):\n    return x + 2") == 0


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return",
        "def f(x) return 1",
        "import os\ndef f(x):\n    return 1",
        "def f(x):\n    return open('/etc/hostname') and 1",
        "def f(x):\n    return ().__class__ and 1",
        "def f(x):\n    return 'x' * 10 ** 9 and 1",
        "raise SystemExit",
        "print(1)\ndef f(x):\n    return 2",
    ],
)
def test_a_program_that_fails_misbehaves_or_fakes_its_result_scores_nothing(program: str) -> None:
    assert passed(program, ["assert f(1) == 1"]) == 0


def test_an_endless_program_is_stopped() -> None:
    assert passed("while True:\n    pass", ["assert True"]) == 0
