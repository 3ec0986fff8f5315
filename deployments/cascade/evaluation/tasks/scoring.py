"""From an answer to a number in [0, 1]."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import assert_never

from cascade.evaluation.tasks.item import Item, Scorer
from cascade.evaluation.tasks.sandbox import passed

_ARTICLES = frozenset({"a", "an", "the"})


def score(item: Item, answer: str) -> float:
    """Return how right `answer` is: 1 for `item.short` and for `item.formal`."""
    match item.scorer:
        case Scorer.NUMBER:
            return float(last_number(answer) == item.references[0])
        case Scorer.MATCH:
            return float(any(words(answer) == words(right) for right in item.references))
        case Scorer.BIGRAMS:
            return max(rouge_2(answer, right) for right in item.references)
        case Scorer.PROGRAM:
            return passed(answer, item.references)
        case _:
            assert_never(item.scorer)


def last_number(text: str) -> str | None:
    """Return the last integer of `text`, as written, or None."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def words(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, no punctuation, no articles."""
    bare = re.sub(r"[^\w\s]", "", text.lower())
    return [word for word in bare.split() if word not in _ARTICLES]


def rouge_2(answer: str, reference: str) -> float:
    """Return the F1 of shared word pairs (Lin, 2004), as in XSum's ROUGE-2."""
    got, wanted = _bigrams(answer), _bigrams(reference)
    shared = (got & wanted).total()
    return 2 * shared / (got.total() + wanted.total()) if shared else 0.0


def _bigrams(text: str) -> Counter[tuple[str, str]]:
    tokens = re.findall(r"\w+", text.lower())
    return Counter(pairwise(tokens))
