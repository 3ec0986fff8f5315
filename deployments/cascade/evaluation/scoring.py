"""Scorers: each turns an answer into a quality in [0, 1].

| scorer | 1 means | as in |
|---|---|---|
| `exact` | equal to a reference but for surrounding space | |
| `match` | equal to a reference but for case, articles and punctuation | SQuAD, TriviaQA |
| `contains` | contains the words of a reference, compared as by `match` | |
| `number` | the last integer of the answer is a reference | GSM8K |
| `bigrams` | the same word pairs as the nearest reference: ROUGE-2, F1 | XSum |
| `bleu` | the same n-grams as the references: sentence BLEU by sacrebleu | WMT |
| `program` | the answer is Python, and all the references, assertions, hold | MBPP |

`json` and `calls` score answers that must fit a schema, and tool calls: `evaluation.structured`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks import Scorer
from cascade.evaluation.tasks.sandbox import passes

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What an answer is worth, from 0 to 1; None where something is not measured."""

    quality: float
    bleu: float | None = None  # of the sentence, where BLEU is reported beside the quality
    valid: float | None = None  # whether it ended and fits its schema, or calls tools as they are
    fields: float | None = None  # share of the right value's fields that it has
    tool: float | None = None  # whether it called the right tools


def score(  # noqa: PLR0911 - one return per scorer
    scorer: Scorer, answer: str, references: Sequence[str]
) -> float:
    """Return the quality of an answer, from 0 to 1.

    Args:
        scorer: How to compare.
        answer: What the model wrote.
        references: Right answers, of which the nearest counts; for `program`, assertions.

    Raises:
        InvalidMeasurement: The scorer is `bleu`, and sacrebleu is not installed.
    """
    match scorer:
        case Scorer.EXACT:
            return float(answer.strip() in {right.strip() for right in references})
        case Scorer.MATCH:
            return float(words(answer) in [words(right) for right in references])
        case Scorer.CONTAINS:
            text = _spaced(answer)
            return float(any(_spaced(right) in text for right in references))
        case Scorer.NUMBER:
            return float(last_number(answer) in references)
        case Scorer.BIGRAMS:
            return max(rouge_2(answer, right) for right in references)
        case Scorer.BLEU:
            return sentence_bleu(answer, references)
        case Scorer.PROGRAM:
            return float(passes(answer.lstrip(), references))  # answers may begin with a space
        case Scorer.JSON | Scorer.CALLS:
            raise InvalidMeasurement(f"`{scorer}` needs more than the text of an answer")


def words(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, no punctuation, no articles."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return [word for word in plain.split() if word not in _ARTICLES]


def _spaced(text: str) -> str:
    """Return the words between spaces, so that a substring begins and ends with whole words."""
    return " " + "".join(f"{word} " for word in words(text))


def last_number(text: str) -> str | None:
    """Return the last integer of `text`, as written, or None."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def rouge_2(answer: str, reference: str) -> float:
    """Return the F1 of shared word pairs (Lin, 2004), as in XSum's ROUGE-2."""
    ours, theirs = (
        Counter(pairwise(re.findall(r"\w+", text.lower()))) for text in (answer, reference)
    )
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def sentence_bleu(answer: str, references: Sequence[str]) -> float:
    """Return sacrebleu's sentence BLEU, 0 to 1, over the n-gram orders that the answer has."""
    bleu = import_extra("sacrebleu").metrics.BLEU(effective_order=True)
    return float(bleu.sentence_score(answer, list(references)).score) / 100


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's BLEU of a corpus, 0 to 100; items may have different numbers of them."""
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(import_extra("sacrebleu").corpus_bleu(list(answers), streams).score)


def import_extra(name: str, *, extra: str = "lab") -> Any:
    """Return a module of the optional dependencies `extra`.

    Raises:
        InvalidMeasurement: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InvalidMeasurement(
            f"{name.partition('.')[0]} is not installed, and this needs it:"
            f" pip install 'speculative-cascades[{extra}]'"
        ) from error
