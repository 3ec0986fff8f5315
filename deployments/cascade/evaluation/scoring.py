"""From an answer to its quality in [0, 1]: the scorers that a workload may name.

| scorer | 1 means | after |
|---|---|---|
| `exact` | a reference, letter for letter but for space around it | |
| `match` | a reference but for case, articles and punctuation | SQuAD, TriviaQA |
| `contains` | the words of a reference stand somewhere in the answer, as `match` reads them | |
| `number` | the last integer of the answer is a reference | GSM8K |
| `bigrams` | the same word pairs as the nearest reference: ROUGE-2, F1 | XSum |
| `bleu` | the same n-grams as the references: sentence BLEU by sacrebleu | WMT |
| `program` | the answer is Python, and the references, assertions, all hold | MBPP |
"""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks.scoring import last_number, passed, rouge_2, words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Scorer(StrEnum):
    """How an answer becomes a number in [0, 1]."""

    EXACT = "exact"
    MATCH = "match"
    CONTAINS = "contains"
    NUMBER = "number"
    BIGRAMS = "bigrams"
    BLEU = "bleu"
    PROGRAM = "program"


def score(scorer: Scorer, answer: str, references: Sequence[str]) -> float:
    """Return how right `answer` is; the nearest reference counts, assertions count together.

    Raises:
        InvalidMeasurement: `bleu` without sacrebleu.
    """
    return _QUALITY[scorer](answer, references)


def sentence_bleu(answer: str, references: Sequence[str]) -> float:
    """Return sacrebleu's sentence BLEU over 100; orders longer than the answer are left out."""
    bleu = extra("sacrebleu").metrics.BLEU(effective_order=True)
    return float(bleu.sentence_score(answer, list(references)).score) / 100


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's BLEU of a corpus, 0 to 100; items may differ in how many references."""
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(extra("sacrebleu").corpus_bleu(list(answers), streams).score)


def extra(name: str) -> Any:
    """Return a module of the extra `lab`.

    Raises:
        InvalidMeasurement: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InvalidMeasurement(
            f"{name} is not installed, and this needs it: pip install 'speculative-cascades[lab]'"
        ) from error


def _exact(answer: str, references: Sequence[str]) -> float:
    return float(answer.strip() in {right.strip() for right in references})


def _match(answer: str, references: Sequence[str]) -> float:
    return float(words(answer) in [words(right) for right in references])


def _contains(answer: str, references: Sequence[str]) -> float:
    said = words(answer)
    return float(any(_within(words(right), said) for right in references))


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    size = len(part)
    return any(whole[at : at + size] == part for at in range(len(whole) - size + 1))


def _number(answer: str, references: Sequence[str]) -> float:
    return float(last_number(answer) in references)


def _bigrams(answer: str, references: Sequence[str]) -> float:
    return max(rouge_2(answer, right) for right in references)


_QUALITY: Mapping[Scorer, Callable[[str, Sequence[str]], float]] = {
    Scorer.EXACT: _exact,
    Scorer.MATCH: _match,
    Scorer.CONTAINS: _contains,
    Scorer.NUMBER: _number,
    Scorer.BIGRAMS: _bigrams,
    Scorer.BLEU: sentence_bleu,
    Scorer.PROGRAM: passed,
}
