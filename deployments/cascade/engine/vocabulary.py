"""How the drafter's tokens are said in the expert's: three ways, by how much they have in common.

- `shared`: almost every id means the same token to both models. The others are not drafted.
- `tli`, token-level intersection (arXiv 2502.05202): tokens with the same bytes are the same token,
  whatever their ids. The drafter's distribution is restricted to them and renormalised.
- `slem`, string-level exact match (the same paper): the drafter writes text, which is drafted in
  the expert's tokens. They have no probabilities, so each counts as drafted for certain.

Everything outside the drafter, and all that it keeps of a session, is in the expert's ids. Only its
model is fed its own: the prompt as its own tokenizer reads that text, then the answer token by
token. So what is fed after a prefix depends on that prefix alone.

Shapes: `N` rows, `D` tokens of the drafter, `V` tokens of the expert, `S` shared tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from cascade.engine.settings import VocabularyWay
from cascade.errors import InvalidRequest, MismatchedPair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cascade.engine.tokenizer import Tokenizer

MIN_SAME_IDS = 0.95  # of the expert's tokens, for `shared`
MIN_COVERAGE = 0.5  # of the tokens of a text, for `tli` to be chosen

_MAX_NAMED = 5  # tokens in a message

_NO_TEXT = re.compile("([\udc80-\udcff]+)")  # bytes that are no text, as `surrogateescape` has them
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

# Logits of tokens that the drafter has not. Far below all others, so that they have no probability;
# finite, so that where a mask allows no other token they have all of it.
_ABSENT = -1e30
_ABSENT_HALF = -3e4  # the same in float16

# Prose, code, numbers and several scripts: how much of such a text two vocabularies share.
SAMPLE = (
    "The committee met on Tuesday to discuss the budget for next year. It was clear that the costs "
    "of the project had been underestimated, and that a new plan would have to be found before the "
    "end of the month. \u201cWe can't wait any longer,\u201d said Dr. Okafor, who has led the "
    "group since 2019.\n\nTo solve the equation, first move the constant to the right side: "
    "3x + 7 = 22, so 3x = 15 and x = 5.\n\n```python\ndef mean(values: list[float]) -> float:\n"
    '    """Return the average."""\n    if not values:\n        raise ValueError("no values")\n'
    "    return sum(values) / len(values)\n```\n\n"
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}\n\n'
    "Die Ergebnisse wurden im Fr\u00fchjahr ver\u00f6ffentlicht. Les r\u00e9sultats sont "
    "publi\u00e9s chaque ann\u00e9e. \u041e\u043d\u0430 \u0447\u0438\u0442\u0430\u0435\u0442 "
    "\u043a\u043d\u0438\u0433\u0443. \u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\n"
)


class TokenTable:
    """The tokens of one model by the bytes that they add to a text.

    Args:
        tokenizer: The model's.
        limit: Ids from here on have no logits.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self.tokenizer = tokenizer
        self.limit = min(limit, tokenizer.size)

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Return the special tokens."""
        tokens = self.tokenizer.tokens
        ids = sorted(self.tokenizer.special_ids & tokens.keys())
        return {tokens[id_]: id_ for id_ in ids if id_ < self.limit}

    @cached_property
    def plain(self) -> Mapping[bytes, int]:
        """Return the tokens that are not special and have text, one for the same bytes.

        A token of one byte that stands for unknown text gives way to one of that text.
        """
        tokenizer, found, fallbacks = self.tokenizer, dict[bytes, int](), dict[bytes, int]()
        for id_, token in sorted(tokenizer.tokens.items()):
            if id_ < self.limit and id_ not in tokenizer.special_ids:
                is_fallback = isinstance(token, str) and _BYTE_TOKEN.fullmatch(token)  # pyright: ignore[reportUnnecessaryIsInstance] - tokens of tiktoken are bytes
                (fallbacks if is_fallback else found).setdefault(tokenizer.bytes_of(id_), id_)
        both = fallbacks | found
        both.pop(b"", None)
        return both

    @cached_property
    def filler(self) -> int:
        """Return the token that stands for what has no tokens."""
        known = (self.tokenizer.unknown_id, self.plain.get(b" "), self.plain.get(b"\n"))
        return next((id_ for id_ in known if id_ is not None and id_ < self.limit), 0)

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """Return the token that texts begin with, if there is one."""
        first = self.tokenizer.encode("a")[:1]
        return () if first == self.tokenizer.encode("a", add_special=False)[:1] else first

    def spell(self, data: bytes) -> list[int]:
        """Return tokens for bytes, each the longest that fits; without bytes that have none."""
        tokens, found, at = self.plain, list[int](), 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (id_ := tokens.get(data[at:end])) is not None:
                    found.append(id_)
                    at = end
                    break
            else:
                at += 1
        return found

    def encode(self, data: bytes, *, begins: bool = False) -> list[int]:
        """Return the tokens of bytes as the tokenizer reads them.

        Args:
            data: Text; bytes that are none, such as a part of a character, are spelled.
            begins: It is the beginning of a text; else it continues one.
        """
        found: list[int] = []
        for run in _NO_TEXT.split(data.decode("utf-8", "surrogateescape")):
            if not run:
                continue
            if _NO_TEXT.fullmatch(run):
                found += self.spell(run.encode("utf-8", "surrogateescape"))
            else:
                found += self._encode_text(run, begins=begins and not found)
        return found

    def _encode_text(self, text: str, *, begins: bool) -> list[int]:
        try:
            ids = list(self.tokenizer.encode(text, add_special=False))
        except InvalidRequest:  # a token without logits
            return self.spell(text.encode())
        if any(id_ >= self.limit for id_ in ids):
            return self.spell(text.encode())
        data = text.encode()
        if begins or self.bytes_of(ids) != b" " + data:
            return ids
        # The tokenizer begins every text with a space.
        shorter = list(self.tokenizer.encode(text.removeprefix(" "), add_special=False))
        if self.bytes_of(shorter) == data:
            return shorter
        return [*self.spell(self.tokenizer.bytes_of(ids[0])[1:]), *ids[1:]]

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that tokens add to a text."""
        return b"".join(map(self.tokenizer.bytes_of, ids))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.plain), default=0)


@dataclass(frozen=True, kw_only=True)
class VocabularyMap:
    """How one drafter's tokens are said in one expert's."""

    way: VocabularyWay
    drafter: TokenTable
    expert: TokenTable
    pairs: Mapping[int, int]  # the drafter's id of each of the expert's ids that is drafted
    differences: tuple[str, ...] = ()  # ids that do not mean the same, in words

    @property
    def size(self) -> int:
        """Return V."""
        return self.expert.limit

    @property
    def summary(self) -> str:
        """Return in a sentence which way is taken, and why."""
        if self.identical:
            return "drafter and expert share their vocabulary"
        if self.way is VocabularyWay.SHARED:
            return (
                f"{len(self.differences)} token ids are not the same to drafter and expert, and "
                f"are not drafted (vocabulary: shared): {in_words(self.differences)}"
            )
        found = (
            f"drafter and expert have different vocabularies: {len(self.pairs)} of the expert's "
            f"{self.size} tokens are the drafter's too, and {self.coverage:.0%} of those of a text"
        )
        if self.way is VocabularyWay.TLI:
            return f"{found}; only these are drafted (vocabulary: tli)"
        return (
            f"{found}; the drafter's text is drafted in the expert's tokens (vocabulary: slem), "
            "under the rules lossless and token_v3 only"
        )

    @property
    def identical(self) -> bool:
        """Whether every token of either model is the other's, with the same id."""
        same = self.way is VocabularyWay.SHARED and not self.differences
        return same and self.drafter.limit == self.expert.limit

    @property
    def reads_alike(self) -> bool:
        """Whether both tokenizers read `SAMPLE` as the same tokens."""
        read = [one.tokenizer.encode(SAMPLE) for one in (self.drafter, self.expert)]
        return read[0] == read[1]

    @cached_property
    def coverage(self) -> float:
        """Return the share of shared tokens among the expert's tokens of `SAMPLE`.

        If the expert reads nothing there, among all its tokens.
        """
        unknown = self.expert.tokenizer.unknown_id
        ids = [id_ for id_ in self.expert.encode(SAMPLE.encode()) if id_ != unknown]
        ids = ids or list(self.expert.tokenizer.tokens)
        return sum(id_ in self.pairs for id_ in ids) / max(1, len(ids))

    @cached_property
    def agreement(self) -> float:
        """Return the share of the expert's tokens of `SAMPLE` that the drafter reads as one too."""
        data = SAMPLE.encode()
        spans = [
            _spans([table.tokenizer.bytes_of(id_) for id_ in table.encode(data)])
            for table in (self.drafter, self.expert)
        ]
        return len(spans[0] & spans[1]) / max(1, len(spans[1]))

    def restrict(self, logits_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the shared tokens, and the probability of all others.

        Args:
            logits_ND: The drafter's raw logits, any float type, any device.

        Returns:
            Logits `[N, V]`, and the lost probability `[N]` at temperature 1.
        """
        drafter_S, expert_S = self._on(logits_ND.device)
        shared_NS = logits_ND.index_select(1, drafter_S)
        fill = _ABSENT_HALF if logits_ND.dtype == torch.float16 else _ABSENT
        logits_NV = logits_ND.new_full((len(logits_ND), self.size), fill)
        logits_NV.index_copy_(1, expert_S, shared_NS)
        all_N, kept_N = (one.float().logsumexp(dim=1) for one in (logits_ND, shared_NS))
        return logits_NV, (1 - (kept_N - all_N).exp()).clamp(0, 1)

    def drafter_ids(self, ids_N: Tensor) -> Tensor:
        """Return the drafter's ids of shared tokens, on their device."""
        if (table_V := self._tables.get(ids_N.device)) is None:
            table_V = torch.from_numpy(self._drafter_id_V).to(ids_N.device)
            self._tables[ids_N.device] = table_V
        return table_V[ids_N]

    def to_drafter(self, tokens: Sequence[int]) -> list[int]:
        """Return what the drafter is fed for tokens of an answer: at least one token for each.

        A token that is not shared is its text in the drafter's own tokens.
        """
        found: list[int] = []
        for token in tokens:
            shared = self.pairs.get(token)
            if shared is not None:
                found.append(shared)
            else:
                found += self._spelled(token)
        return found

    def prompt_to_drafter(self, prompt: Sequence[int]) -> list[int]:
        """Return a prompt in the drafter's tokens; at least one."""
        if self.way is VocabularyWay.SHARED:
            return self.to_drafter(prompt)
        special, start = self.expert.tokenizer.special_ids, self.drafter.begin
        if tuple(prompt[:1]) == self.expert.begin:
            prompt = prompt[1:]
        found, run = list(start), list[int]()
        for token in prompt:
            if token not in special:
                run.append(token)
                continue
            found += self._encode_run(run, begins=len(found) == len(start))
            found += self.to_drafter([token])
            run = []
        found += self._encode_run(run, begins=len(found) == len(start))
        return found or [self.drafter.filler]

    def _encode_run(self, tokens: Sequence[int], *, begins: bool) -> list[int]:
        """Return the drafter's tokens of the text of tokens that are not special."""
        data, expert = self.expert.bytes_of(tokens), self.expert.tokenizer
        if begins and data.startswith(b" ") and not expert.decode(tokens[:1]).startswith(" "):
            data = data[1:]  # the expert begins every text with a space
        return self.drafter.encode(data, begins=begins)

    def _spelled(self, token: int) -> Sequence[int]:
        """Return the drafter's tokens of a token that is not shared."""
        if (found := self._texts.get(token)) is None:
            data = self.expert.tokenizer.bytes_of(token)
            found = self._texts[token] = self.drafter.encode(data) or [self.drafter.filler]
        return found

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ids of the shared tokens, of the drafter and of the expert, [S]."""
        if device not in self._indices:
            drafter_S = np.fromiter(self.pairs.values(), np.int64, len(self.pairs))
            expert_S = np.fromiter(self.pairs.keys(), np.int64, len(self.pairs))
            self._indices[device] = (
                torch.from_numpy(drafter_S).to(device),
                torch.from_numpy(expert_S).to(device),
            )
        return self._indices[device]

    @cached_property
    def _indices(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _texts(self) -> dict[int, Sequence[int]]:
        return {}

    @cached_property
    def _drafter_id_V(self) -> NDArray[np.int64]:  # noqa: N802 - V is its shape
        found_V = np.full(self.size, self.drafter.filler, np.int64)
        for expert_id, drafter_id in self.pairs.items():
            found_V[expert_id] = drafter_id
        return found_V


def map_vocabularies(
    drafter: Tokenizer,
    expert: Tokenizer,
    *,
    drafter_size: int,
    expert_size: int,
    way: VocabularyWay = VocabularyWay.AUTO,
) -> VocabularyMap:
    """Return how the drafter's tokens are said in the expert's.

    Args:
        drafter: The drafter's tokenizer.
        expert: The expert's tokenizer.
        drafter_size: Logits per token of the drafter; either model may have some that are padding.
        expert_size: Logits per token of the expert.
        way: Which way to take; by default the first of the three that does well enough.

    Raises:
        MismatchedPair: The vocabularies do not share enough for the way that was chosen.
    """
    ours, theirs = TokenTable(drafter, drafter_size), TokenTable(expert, expert_size)
    differences = dict(_differences(ours, theirs))
    same = {id_: id_ for id_ in _known(theirs) if id_ not in differences}
    named = tuple(differences[id_] for id_ in sorted(differences))
    enough = len(same) >= MIN_SAME_IDS * len(_known(theirs))
    if way is VocabularyWay.SHARED and not enough:
        raise MismatchedPair(
            "Drafter and expert do not share a vocabulary, ids mean different tokens: "
            f"{in_words(named)}. Serve a drafter trained with the expert's tokenizer, or set "
            "`drafter.vocabulary: auto`"
        )
    if way is VocabularyWay.SHARED or (way is VocabularyWay.AUTO and enough):
        pairs = _with_roles(same, ours, theirs)
        return VocabularyMap(
            way=VocabularyWay.SHARED, drafter=ours, expert=theirs, pairs=pairs, differences=named
        )
    pairs = {
        id_: ours.special[token] for token, id_ in theirs.special.items() if token in ours.special
    }
    pairs |= {id_: ours.plain[data] for data, id_ in theirs.plain.items() if data in ours.plain}
    found = VocabularyMap(
        way=VocabularyWay.TLI if way is VocabularyWay.AUTO else way,
        drafter=ours,
        expert=theirs,
        pairs=_with_roles(pairs, ours, theirs),
        differences=named,
    )
    if way is VocabularyWay.TLI and not pairs:
        raise MismatchedPair(
            "Drafter and expert have no token in common, so `drafter.vocabulary: tli` leaves "
            "nothing to draft; set it to auto or slem, or serve another drafter"
        )
    if way is VocabularyWay.AUTO and found.coverage < MIN_COVERAGE:
        found = replace(found, way=VocabularyWay.SLEM)
    return found


def in_words(differences: Sequence[str]) -> str:
    """Return the first of them as a text, and how many more there are."""
    named = "; ".join(differences[:_MAX_NAMED])
    more = len(differences) - _MAX_NAMED
    return f"{named}; and {more} more" if more > 0 else named


def _known(table: TokenTable) -> list[int]:
    """Return the ids that have a token and logits."""
    return [id_ for id_ in table.tokenizer.tokens if id_ < table.limit]


def _differences(drafter: TokenTable, expert: TokenTable) -> Iterator[tuple[int, str]]:
    """Yield each id that is not the same token to both models, and what it is to them."""
    ours, theirs = drafter.tokenizer, expert.tokenizer
    special = ours.special_ids, theirs.special_ids
    for id_ in sorted(ours.tokens.keys() | theirs.tokens.keys()):
        left = ours.tokens.get(id_) if id_ < drafter.limit else None
        right = theirs.tokens.get(id_) if id_ < expert.limit else None
        if left != right:
            yield id_, f"id {id_} is {_name(left)} to the drafter and {_name(right)} to the expert"
        elif left is not None and (id_ in special[0]) != (id_ in special[1]):
            whose = "drafter" if id_ in special[0] else "expert"
            yield id_, f"id {id_}, {_name(left)}, is special to the {whose} only"


def _with_roles(
    pairs: Mapping[int, int], drafter: TokenTable, expert: TokenTable
) -> dict[int, int]:
    """Return the pairs, and those of tokens that begin or end texts and have different names."""
    found, taken = dict(pairs), set(pairs.values())
    ours, theirs = drafter.tokenizer, expert.tokenizer
    for left, right in ((ours.stop_ids, theirs.stop_ids), (ours.begin_ids, theirs.begin_ids)):
        for drafter_id, expert_id in zip(left, right, strict=False):
            known = drafter_id < drafter.limit and expert_id < expert.limit
            if known and expert_id not in found and drafter_id not in taken:
                found[expert_id] = drafter_id
                taken.add(drafter_id)
    return found


def _spans(pieces: Sequence[bytes]) -> set[tuple[int, int]]:
    """Return where each piece of a text begins and ends."""
    return set(pairwise(accumulate(map(len, pieces), initial=0)))


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)
