"""Masks of grammars over tokens of single bytes, where answers must still be UTF-8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascade.sampling.token_mask import allowed_bits, allows
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from collections.abc import Sequence

STOP, PIECES = 256, (b"\x9f\xbfx", b"\xa0\x80", b"a\xed", b"\xed\xa0\x80", b"\xed\x9f\xbf")
TEXTS = (*(bytes([byte]) for byte in range(256)), b"", *PIECES)

GRAMMARS = {
    "any JSON text": Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "string"}'),
    "a short one": Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type":"string","maxLength":4}'),
    "a class": Grammar(kind=GrammarKind.REGEX, text='"[^b]{1,4}"'),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokens = TokenTexts(texts=TEXTS, special_ids=frozenset({STOP}), stop_ids=(STOP,))
    return GrammarCompiler(tokens)


def may_follow(compiler: GrammarCompiler, grammar: Grammar, tokens: Sequence[int]) -> bool:
    """Return whether the grammar's masks allow each of these tokens after those before it."""
    mask = compiler.mask(grammar, (STOP,))
    bits_RW = allowed_bits(
        [mask], (), tokens[:-1], stop_ids=(STOP,), vocabulary=compiler.vocabulary
    )
    assert bits_RW is not None
    return all(allows(bits_RW, tokens))


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
@pytest.mark.parametrize("text", ["\ud7ff", "\ue000", "\uffff", "\U0010ffff", "\u00e9", "x"])
def test_every_character_may_be_written_byte_by_byte(
    compiler: GrammarCompiler, grammar: Grammar, text: str
) -> None:
    assert may_follow(compiler, grammar, list(f'"{text}"'.encode()))


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
@pytest.mark.parametrize(
    "tokens",
    [
        [0x22, 0xED, 0xA0],
        [0x22, 0xED, 0xBF],
        [0x22, 0xED, TEXTS.index(b"\xa0\x80")],
        [0x22, TEXTS.index(b"a\xed"), 0xA0],
        [0x22, TEXTS.index(b"\xed\xa0\x80")],
    ],
)
def test_no_half_of_a_character_may_be_written(
    compiler: GrammarCompiler, grammar: Grammar, tokens: list[int]
) -> None:
    assert not may_follow(compiler, grammar, tokens)
    assert may_follow(compiler, grammar, tokens[:-1]) or len(tokens) == 2


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_other_tokens_of_several_bytes_may_follow(
    compiler: GrammarCompiler, grammar: Grammar
) -> None:
    assert may_follow(compiler, grammar, [0x22, 0xED, TEXTS.index(b"\x9f\xbfx")])
    assert may_follow(compiler, grammar, [0x22, TEXTS.index(b"\xed\x9f\xbf"), 0x22])
