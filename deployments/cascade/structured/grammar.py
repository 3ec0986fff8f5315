"""Grammars compiled for a tokenizer, and the masks that they give.

Only the states of a grammar that answers reach are compiled to masks of the vocabulary, when they
are first reached: a new schema costs milliseconds, and none is compiled whole.

Shapes: `R` rows of one block, `W` words of a bitmask.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xgrammar as xgr

from cascade.errors import InvalidRequest
from cascade.sampling.token_mask import bits_of
from cascade.structured.endless import is_endless
from cascade.types import GrammarKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.engine.tokenizer import Tokenizer
    from cascade.sampling.token_mask import Bits
    from cascade.types import Grammar

CACHE_BYTES = 64 * 2**20  # of compiled grammars; xgrammar's masks of common rules may take as many

# Spaces and line breaks between two parts of JSON: enough to indent, and a model that writes
# nothing else comes to an end.
MAX_WHITESPACE = 32

_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")  # all but the ends of lines

# A code point of half a character: its bytes are no UTF-8, but xgrammar takes them for such.
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
_SURROGATE_END = re.compile(rb"[\xa0-\xbf]")

_SOURCE = re.compile(r"^\[[\d:]+\] \S+\.cc:\d+: (?:Check failed: \(.*?\) is false: )?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTexts:
    """What grammars know of a tokenizer."""

    texts: tuple[bytes, ...]  # of each id below the vocabulary's size
    special_ids: frozenset[int]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: int) -> TokenTexts:
        """Return the texts of a tokenizer's first `vocabulary` tokens."""
        return cls(
            texts=tuple(map(tokenizer.bytes_of, range(vocabulary))),
            special_ids=tokenizer.special_ids,
            stop_ids=tokenizer.stop_ids,
        )

    def as_json(self) -> dict[str, Any]:
        """Return a message from which `from_json` makes the same."""
        return {
            "texts": [text.decode("latin-1") for text in self.texts],
            "special_ids": sorted(self.special_ids),
            "stop_ids": self.stop_ids,
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> TokenTexts:
        """Return what `as_json` was made of."""
        return cls(
            texts=tuple(text.encode("latin-1") for text in message["texts"]),
            special_ids=frozenset(message["special_ids"]),
            stop_ids=tuple(message["stop_ids"]),
        )


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last."""

    def __init__(
        self, tokens: TokenTexts | Callable[[], TokenTexts], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Compile for a tokenizer.

        Args:
            tokens: Its tokens, or what returns them when the first grammar is compiled.
            cache_bytes: Compiled grammars that are kept.
        """
        self._given = tokens
        self._cache_bytes = cache_bytes
        self._compiled: OrderedDict[Grammar, xgr.CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()  # of `_compiled`

    def find(self, grammar: Grammar) -> xgr.CompiledGrammar | None:
        """Return a grammar that is compiled already, without waiting for another."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
            return self._compiled.get(grammar)

    def compile(self, grammar: Grammar) -> xgr.CompiledGrammar:
        """Return a grammar compiled.

        Raises:
            InvalidRequest: It is none, or has what xgrammar does not support.
        """
        if (known := self.find(grammar)) is not None:
            return known
        try:
            found = self._compile(grammar)
        except (RuntimeError, ValueError) as error:
            reason = _SOURCE.sub("", str(error)).strip()
            raise InvalidRequest(reason) from error
        with self._lock:
            self._compiled[grammar] = found
            sizes = {one: compiled.memory_size_bytes for one, compiled in self._compiled.items()}
            while len(self._compiled) > 1 and sum(sizes.values()) > self._cache_bytes:
                del sizes[self._compiled.popitem(last=False)[0]]
        return found

    def mask(self, grammar: Grammar, stop_ids: Sequence[int]) -> GrammarMask:
        """Return the mask of a session; raises as `compile` does.

        Args:
            grammar: What its answer must match.
            stop_ids: What ends it. Special tokens follow a match; others, which the caller named,
                are text.
        """
        special = [id_ for id_ in stop_ids if id_ in self._tokens.special_ids]
        return GrammarMask(self.compile(grammar), special or stop_ids, utf8_rule=self._utf8_rule)

    def check_ends(self, grammar: Grammar) -> None:
        """Check that a finite answer can match a grammar; raises as `compile` does.

        Raises:
            InvalidRequest: None can.
        """
        if is_endless(str(self.compile(grammar).grammar)):
            raise InvalidRequest(
                "no answer can match it, because it never ends: each part that it requires requires"
                " itself again"
            )

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        return len(self._tokens.texts)

    @cached_property
    def _tokens(self) -> TokenTexts:
        return self._given if isinstance(self._given, TokenTexts) else self._given()

    def _compile(self, grammar: Grammar) -> xgr.CompiledGrammar:
        text = grammar.text
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA | GrammarKind.OPEN_JSON_SCHEMA:
                strict = grammar.kind is GrammarKind.JSON_SCHEMA
                return self._json_compiler.compile_json_schema(
                    text, strict_mode=strict, max_whitespace_cnt=MAX_WHITESPACE
                )
            case GrammarKind.REGEX:
                return self._compiler.compile_regex(text)
            case GrammarKind.EBNF:
                return self._compiler.compile_grammar(text)
            case GrammarKind.STRUCTURAL_TAG:
                return self._tag_compiler.compile_structural_tag(text)

    @cached_property
    def _utf8_rule(self) -> Utf8Rule:
        texts = self._tokens.texts
        ends = (id_ for id_, text in enumerate(texts) if _SURROGATE_END.match(text))
        return Utf8Rule(
            first_ids=frozenset(id_ for id_, text in enumerate(texts) if text.endswith(b"\xed")),
            next_W=~bits_of(ends, len(texts)),
        )

    @cached_property
    def _compiler(self) -> xgr.GrammarCompiler:
        return self._compiler_of(special=False)

    @cached_property
    def _json_compiler(self) -> xgr.GrammarCompiler:
        """Xgrammar lets control characters into strings of limited length, which no JSON has."""
        return self._compiler_of(special=False, without=_CONTROL)

    @cached_property
    def _tag_compiler(self) -> xgr.GrammarCompiler:
        """Tags may be special tokens, written as their text; no other text has them."""
        return self._compiler_of(special=True)

    def _compiler_of(
        self, *, special: bool, without: re.Pattern[bytes] | None = None
    ) -> xgr.GrammarCompiler:
        tokens = self._tokens
        without_text = frozenset[int]() if special else tokens.special_ids
        texts = [
            b""
            if id_ in without_text or _SURROGATE.search(text) or (without and without.search(text))
            else text
            for id_, text in enumerate(tokens.texts)
        ]
        return xgr.GrammarCompiler(
            xgr.TokenizerInfo(
                texts,
                xgr.VocabType.RAW,
                vocab_size=len(texts),
                stop_token_ids=list(tokens.stop_ids) or None,
            ),
            max_threads=1,
            cache_limit_bytes=self._cache_bytes,
            enable_dynamic_compilation=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Utf8Rule:
    """Which tokens may follow those that end in the first byte of a surrogate."""

    first_ids: frozenset[int]
    next_W: Bits


class GrammarMask:
    """The mask of a session's grammar: a matcher that goes along with the session's tokens."""

    def __init__(
        self, compiled: xgr.CompiledGrammar, stop_ids: Sequence[int], *, utf8_rule: Utf8Rule
    ) -> None:
        self._utf8_rule = utf8_rule
        self._matcher = xgr.GrammarMatcher(compiled, override_stop_tokens=list(stop_ids) or None)
        self._tokens: list[int] = []  # where the matcher stands

    def restrict(self, bits_RW: Bits, answer: Sequence[int], drafted: Sequence[int]) -> bool:
        """Clear the bits of tokens that may not follow; return whether any row is restricted.

        Rows after a token that does not match are left as they are: it is rejected.
        """
        restricted = False
        words_1W = np.empty((1, bits_RW.shape[1]), np.int32)
        if not self._go_to(answer):
            return False
        for row in range(len(bits_RW)):
            if row and not self._accept(drafted[row - 1]):
                break
            if self._matcher.is_terminated():
                break
            if self._matcher.fill_next_token_bitmask(words_1W):
                bits_RW[row] &= words_1W[0].view(np.uint32)
                restricted = True
            if self._tokens and self._tokens[-1] in self._utf8_rule.first_ids:
                bits_RW[row] &= self._utf8_rule.next_W
                restricted = True
        return restricted

    def _go_to(self, tokens: Sequence[int]) -> bool:
        """Let the matcher stand after these tokens; return whether they match."""
        known = self._tokens
        if len(known) > len(tokens) or known != list(tokens[: len(known)]):
            pairs = enumerate(zip(known, tokens, strict=False))
            shared = next(
                (i for i, (old, new) in pairs if old != new), min(len(known), len(tokens))
            )
            self._matcher.rollback(len(known) - shared)
            del known[shared:]
        return all(map(self._accept, tokens[len(known) :]))

    def _accept(self, token: int) -> bool:
        accepted = not self._matcher.is_terminated() and self._matcher.accept_token(token)
        if accepted:
            self._tokens.append(token)
        return accepted
