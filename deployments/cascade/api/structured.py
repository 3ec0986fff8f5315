"""What a body says that its completions must match, in any of its spellings, as one grammar."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from cascade.api.chat_format import THOUGHTS
from cascade.api.prompts import check_at_most
from cascade.api.schema import JsonObjectFormat, JsonSchemaFormat, StructuralTagFormat
from cascade.errors import InvalidRequest
from cascade.structured.grammar import MAX_WHITESPACE
from cascade.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.api.chat_format import ChatFormat
    from cascade.api.context import ServingContext
    from cascade.api.schema import Generated
    from cascade.types import Request

_ANY_OBJECT = Grammar(kind=GrammarKind.OPEN_JSON_SCHEMA, text='{"type":"object"}')


class GivenGrammar(NamedTuple):
    """A grammar, and the field of the body that has it."""

    grammar: Grammar
    param: str


def given_grammar(body: Generated, service: ServingContext) -> GivenGrammar | None:
    """Return what the completions of a body must match, if it says so.

    Raises:
        InvalidRequest: It says several things, something too long, or never lets an answer end.
    """
    found = list(_given(body))
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(f"`{one.param}`" for one in found)
        raise InvalidRequest(
            f"The body says more than once what the completion must match: {names}; send one",
            param=found[1].param,
        )
    grammar, param = found[0]
    check_at_most(len(grammar.text), service.limits.grammar_characters, param, "characters")
    if body.ignore_eos:
        raise InvalidRequest(
            f"`ignore_eos` has no effect where `{param}` says when a completion ends; leave it out",
            param="ignore_eos",
        )
    return found[0]


def after_thoughts(grammar: Grammar, form: ChatFormat, *, start: str | None) -> Grammar:
    """Return the grammar of an answer that may begin with thoughts, which are any text.

    A schema that is not strict becomes so: what it then leaves out was allowed, never needed.

    Args:
        grammar: What follows the thoughts.
        form: How the model writes thoughts.
        start: The field of the response template that the prompt ends in.
    """
    element = None if form.think is None else element_of(grammar)
    if form.think is None or element is None:
        return grammar
    return structural_tag(thoughts_first(element, form.think, start=start))


def element_of(grammar: Grammar) -> dict[str, Any] | None:
    """Return a grammar as a format of xgrammar's structural tags.

    None: it is a tag itself, which says where thoughts and calls are, or its schema is no JSON, and
    `check_grammar` says so.
    """
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA | GrammarKind.OPEN_JSON_SCHEMA:
            with suppress(ValueError):
                schema = json.loads(grammar.text)
                return {
                    "type": "json_schema",
                    "json_schema": schema,
                    "max_whitespace_cnt": MAX_WHITESPACE,
                }
            return None
        case GrammarKind.REGEX:
            return {"type": "regex", "pattern": grammar.text}
        case GrammarKind.EBNF:
            return {"type": "grammar", "grammar": grammar.text}
        case GrammarKind.STRUCTURAL_TAG:
            return None


def structural_tag(element: Any) -> Grammar:
    """Return the grammar of a format of xgrammar's structural tags."""
    tag = {"type": "structural_tag", "format": element}
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps(tag, ensure_ascii=False))


def thoughts_first(element: Any, think: tuple[str, str], *, start: str | None) -> dict[str, Any]:
    """Return a format of xgrammar's structural tags with thoughts before it, if it begins none.

    Args:
        element: The format.
        think: What begins thoughts, and what ends them.
        start: As `after_thoughts` takes it.
    """
    begin, end = think
    begun = start == THOUGHTS
    thoughts: list[dict[str, Any]] = [
        {
            "type": "tag",
            "begin": "" if begun else begin,
            "content": {"type": "any_text", "excludes": [begin, end]},
            "end": end,
        },
        {"type": "regex", "pattern": r"\n{0,2}"},
    ]
    if not begun:
        thoughts = [{"type": "optional", "content": {"type": "sequence", "elements": thoughts}}]
    return {"type": "sequence", "elements": [*thoughts, element]}


async def check_grammar(request: Request, param: str, service: ServingContext) -> None:
    """Check that the tiers can compile the grammar of a request.

    Args:
        request: The request.
        param: The field that has the grammar; empty: it is that of tools.
        service: Compiles it once, apart from everything else.

    Raises:
        InvalidRequest: They cannot.
    """
    grammar = request.policy.grammar
    if grammar is None or service.grammars is None:
        return
    try:
        await service.grammars.check(grammar)
    except InvalidRequest as error:
        param = param or "tools"
        raise InvalidRequest(f"`{param}` cannot be used: {error}", param=param) from error


def _given(body: Generated) -> Iterator[GivenGrammar]:
    param = "response_format"
    match body.response_format:
        case JsonObjectFormat():
            yield GivenGrammar(_ANY_OBJECT, param)
        case JsonSchemaFormat(json_schema=given):
            kind = GrammarKind.JSON_SCHEMA
            if given.strict is False:
                kind = GrammarKind.OPEN_JSON_SCHEMA
            grammar = Grammar(kind=kind, text=_text(given.schema_))
            yield GivenGrammar(grammar, f"{param}.json_schema.schema")
        case StructuralTagFormat() as tag:
            text = tag.model_dump_json()
            yield GivenGrammar(Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=text), param)
        case _:
            pass
    outputs = body.structured_outputs
    spellings = {
        "guided_json": (GrammarKind.JSON_SCHEMA, body.guided_json),
        "guided_regex": (GrammarKind.REGEX, body.guided_regex),
        "guided_choice": (GrammarKind.EBNF, _choice(body.guided_choice)),
        "guided_grammar": (GrammarKind.EBNF, body.guided_grammar),
    }
    if outputs is not None:
        spellings |= {
            "structured_outputs.json": (GrammarKind.JSON_SCHEMA, outputs.json_),
            "structured_outputs.regex": (GrammarKind.REGEX, outputs.regex),
            "structured_outputs.choice": (GrammarKind.EBNF, _choice(outputs.choice)),
            "structured_outputs.grammar": (GrammarKind.EBNF, outputs.grammar),
            "structured_outputs.structural_tag": (
                GrammarKind.STRUCTURAL_TAG,
                outputs.structural_tag,
            ),
        }
        if outputs.json_object:
            yield GivenGrammar(_ANY_OBJECT, "structured_outputs.json_object")
    for name, (kind, value) in spellings.items():
        if value is not None:
            yield GivenGrammar(Grammar(kind=kind, text=_text(value)), name)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _choice(texts: list[str] | None) -> str | None:
    """Return a grammar that allows these texts."""
    if texts is None:
        return None
    return "root ::= " + " | ".join(f'"{"".join(map(_escaped, text))}"' for text in texts)


def _escaped(char: str) -> str:
    """Return a character as a text of EBNF has it."""
    return char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}"
