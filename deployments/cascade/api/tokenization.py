"""Prompts to tokens and back, without a model: the routes `/tokenize` and `/detokenize` of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cascade.api.prompts import check_ids, check_model, naming, template_arguments
from cascade.api.tools import check_shows_tools, shown_tools
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from cascade.api.context import ServingContext
    from cascade.api.schema import DetokenizeBody, TokenizeBody


def tokenize(body: TokenizeBody, service: ServingContext) -> dict[str, Any]:
    """Return the tokens of a prompt or of a conversation; they may be more than the context holds.

    Raises:
        InvalidRequest: The body has both or neither, or the template rejects the conversation.
        ModelNotFound: It names a model that is not served.
    """
    check_model(body.model, service)
    if (body.prompt is None) == (body.messages is None):
        found = "neither" if body.prompt is None else "both"
        raise InvalidRequest(
            f"The body has {found} of `prompt` and `messages`; send one of them", param="prompt"
        )
    tokenizer = service.tokenizer
    if body.tools:
        check_shows_tools(service, "tools")
    if body.messages is not None:
        with naming("messages"):
            arguments = template_arguments(body.messages, body)
            text = tokenizer.render(**arguments, tools=shown_tools(body.tools or ()))
            tokens = tokenizer.encode(text, add_special=bool(body.add_special_tokens))
    else:
        with naming("prompt"):
            add_special = body.add_special_tokens is not False
            tokens = tokenizer.encode(body.prompt or "", add_special=add_special)
    return {
        "count": len(tokens),
        "max_model_len": service.context_tokens,
        "tokens": list(tokens),
        "token_strs": tokenizer.strings(tokens) if body.return_token_strs else None,
    }


def detokenize(body: DetokenizeBody, service: ServingContext) -> dict[str, Any]:
    """Return the text of tokens, with special tokens.

    Raises:
        InvalidRequest: A token id does not exist.
        ModelNotFound: The body names a model that is not served.
    """
    check_model(body.model, service)
    check_ids(body.tokens, "tokens", service)
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special=False)}
