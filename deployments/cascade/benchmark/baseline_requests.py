"""What baselines share: greedy requests as token ids, and answers made of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import CompletionResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascade.engine.tokenizer import Tokenizer


class GreedyRequest(NamedTuple):
    """A prompt as token ids, and the limit of its answer."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Renders prompts and answers as our server does."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]

    def request(self, body: Mapping[str, Any]) -> GreedyRequest:
        """Return a request body as tokens.

        Raises:
            InvalidMeasurement: The request is not greedy.
        """
        if body.get("temperature") != 0:
            raise InvalidMeasurement("baselines answer greedily; set the temperature to 0")
        prompt: Any = body.get("prompt")
        if "messages" in body:
            prompt = self.tokenizer.chat(body["messages"])
        elif isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        return GreedyRequest(tuple(prompt), int(body["max_tokens"]))

    def answer(
        self, request: GreedyRequest, tokens: Sequence[int], **measured: Any
    ) -> CompletionResult:
        """Return the tokens up to the limit, or to the first that ends the answer.

        Args:
            request: What was asked.
            tokens: What was generated, perhaps with more tokens after the end.
            measured: Times and statistics of the result.
        """
        kept = list(tokens)[: request.max_tokens]
        ends = (end for end, token in enumerate(kept, start=1) if token in self.stop_ids)
        kept = kept[: next(ends, len(kept))]
        detokenizer = self.tokenizer.detokenizer(request.prompt)
        return CompletionResult(
            text=detokenizer.push(kept) + detokenizer.flush(),
            finish_reason="stop" if kept and kept[-1] in self.stop_ids else "length",
            prompt_tokens=len(request.prompt),
            completion_tokens=len(kept),
            **measured,
        )
