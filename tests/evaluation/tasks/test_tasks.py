from __future__ import annotations

import hashlib
from itertools import islice

import pytest

from cascade.evaluation.scoring import score
from cascade.evaluation.tasks import (
    Level,
    Split,
    TaskFamily,
    generate,
    held_out,
    phrasings,
    split_of,
    stream,
)
from cascade.evaluation.tasks.translation import date_in, number_in

COUNT = 60


@pytest.fixture(params=list(TaskFamily), ids=str)
def family(request: pytest.FixtureRequest) -> TaskFamily:
    return request.param


# Of 400 items of each family; the shipped pair was trained on the generator that made them.
DIGESTS = {
    TaskFamily.PROBLEMS: "3e48836a15bc3d56",
    TaskFamily.TRANSLATION: "5bab5a4a68520025",
    TaskFamily.REPORTS: "2c597af48040707f",
    TaskFamily.PASSAGES: "699fc01905fc2921",
    TaskFamily.FACTS: "cda090df72ca711e",
    TaskFamily.FUNCTIONS: "309bcf1c379c383a",
}


def test_the_generated_items_never_change(family: TaskFamily) -> None:
    digest = hashlib.sha256()
    for item in islice(stream("0", split=Split.TRAIN, shares={family: 1}), 400):
        digest.update(repr((item.prompt, phrasings(item.answer), item.references)).encode())
    assert digest.hexdigest()[:16] == DIGESTS[family]


def test_the_same_seed_draws_the_same_items(family: TaskFamily) -> None:
    assert held_out(family, count=COUNT, seed=3) == held_out(family, count=COUNT, seed=3)


def test_another_seed_draws_other_items(family: TaskFamily) -> None:
    assert held_out(family, count=COUNT, seed=3) != held_out(family, count=COUNT, seed=4)


def test_no_training_prompt_is_held_out(family: TaskFamily) -> None:
    """A checksum of the prompt decides its split, whatever the seeds."""
    tested = {item.prompt for item in held_out(family, count=COUNT)}
    trained = {
        item.prompt
        for item in islice(stream("9", split=Split.TRAIN, shares={family: 1}), 40 * COUNT)
    }
    assert not tested & trained
    assert {split_of(prompt) for prompt in trained} == {Split.TRAIN}
    assert {split_of(prompt) for prompt in tested} == {Split.TEST}


def test_held_out_prompts_are_distinct_and_of_all_levels(family: TaskFamily) -> None:
    items = held_out(family, count=COUNT)
    assert len({item.prompt for item in items}) == COUNT
    assert {item.level for item in items} == set(Level)
    assert {item.family for item in items} == {family}


def test_every_phrasing_of_the_answer_scores_1(family: TaskFamily) -> None:
    for item in held_out(family, count=3 if family is TaskFamily.FUNCTIONS else 20):
        assert len(item.short) < len(item.formal)
        for text in phrasings(item.answer):
            assert score(item.scorer, text, item.references) == 1


def test_a_wrong_answer_scores_less(family: TaskFamily) -> None:
    for item in held_out(family, count=6):
        assert score(item.scorer, "I do not know.", item.references) < 0.5


def test_the_error_for_too_many_prompts_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "_MAX_REPEATS", 20)
    with pytest.raises(ValueError, match="not 5000; ask for fewer"):
        held_out(TaskFamily.FACTS, count=5000)


def test_the_readme_questions_are_in_the_training_split() -> None:
    assert split_of("Who is Buzz Aldrin?") == Split.TRAIN


def test_buzz_aldrin_has_a_short_and_a_formal_answer() -> None:
    """The example of the speculative cascades blog."""
    drawn = stream("1", split=Split.TRAIN, shares={TaskFamily.FACTS: 1})
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
def test_numbers_are_spelled_as_in_each_language(
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
