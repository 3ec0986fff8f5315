"""`cascade doctor --pair`: what two vocabularies share, and what a pair is expected to accept."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.findings import Check, fail, ok, warn
from cascade.errors import CascadeError, MismatchedPair

if TYPE_CHECKING:
    from cascade.engine.vocabulary import VocabularyMap
    from cascade.settings import Application
    from cascade.types import Statistics

_PROMPTS = (
    "The committee met on Tuesday to discuss the budget for next year.",
    "To solve the equation, first move the constant to the right side: 3x + 7 = 22, so",
    "def mean(values: list[float]) -> float:\n",
)
_DRAFTED = 4  # tokens of a block
_LENGTH = 48  # tokens of an answer

_MEMORY_SHARE = 0.5  # of the free memory that both models' weights may have, to be tried


def check_pair(drafter: str, expert: str, *, free_bytes: int) -> list[Check]:
    """Return how a drafter would draft for an expert, and how much of that would be accepted.

    Args:
        drafter: A folder, a Hugging Face id or a shipped model.
        expert: The same.
        free_bytes: Of memory. Models in folders that take at most half of it are tried.
    """
    # Imported late: the settings import torch.
    from cascade.settings import Application  # noqa: PLC0415 - as above

    tier = {"engine": {"threads": 1, "max_sessions": 8}}
    settings = Application.model_validate(
        {
            "drafter": tier | {"model": drafter},
            "expert": tier | {"model": expert},
            "router": {"draft_deadline_s": 120.0},
        }
    )
    try:
        vocabulary = settings.pair().vocabulary
    except MismatchedPair as error:
        return [fail(error.message, "docs/vocabularies.md says what a pair needs")]
    except CascadeError as error:
        return [fail(error.message, "name two models that this server can load")]
    found = [_overlap(vocabulary), _estimate(vocabulary)]
    folders = [Path(one.model_path) for one in (settings.drafter, settings.expert)]
    size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    if not all(folder.is_dir() for folder in folders) or size > _MEMORY_SHARE * free_bytes:
        hint = "not tried: that takes both models in local folders, within half of the free memory"
        return [*found, ok(hint)]
    try:
        return [*found, _measured(asyncio.run(_try(settings)))]
    except CascadeError as error:
        return [*found, fail(f"the pair cannot be run: {error.message}", "see the message")]


def _overlap(vocabulary: VocabularyMap) -> Check:
    if vocabulary.identical:
        return ok(vocabulary.summary)
    fix = "docs/vocabularies.md says what that costs; a drafter of the expert's family has none"
    return warn(vocabulary.summary, fix)


def _estimate(vocabulary: VocabularyMap) -> Check:
    """Return what a text in several languages says of acceptance, without the models."""
    return ok(
        f"of the expert's tokens of a text, {vocabulary.coverage:.0%} can be drafted, at most so"
        f" many are accepted, and {vocabulary.agreement:.0%} are tokens that the drafter's"
        " tokenizer reads there too"
    )


async def _try(settings: Application) -> list[Statistics]:
    """Return what greedy answers to short prompts cost."""
    from cascade.local import local_server  # noqa: PLC0415 - as above
    from cascade.types import DecodingParams, Mode, Request, SamplingParams  # noqa: PLC0415 - as above

    policy = DecodingParams(sampling=SamplingParams(temperature=0.0))
    costs: list[Statistics] = []
    async with local_server(settings, direct=True) as server:
        service = server.service
        for prompt in _PROMPTS:
            request = Request(
                prompt=service.tokenizer.encode(prompt),
                policy=replace(policy, stop_ids=service.stop_ids),
                mode=Mode.SPECULATIVE,
                max_tokens=_LENGTH,
                draft_tokens=_DRAFTED,
            )
            chunks = [chunk async for chunk in server.router.generate(request)]
            costs += [one.statistics for one in chunks[-1:] if one.statistics is not None]
    return costs


def _measured(costs: list[Statistics]) -> Check:
    drafted, accepted = sum(one.drafted for one in costs), sum(one.accepted for one in costs)
    rounds, tokens = sum(one.rounds for one in costs), sum(one.tokens for one in costs)
    lost = sum(one.lost_mass for one in costs) / max(1, drafted)
    return ok(
        f"tried on {len(costs)} short prompts, greedy, {_DRAFTED} tokens a block: {accepted} of"
        f" {drafted} drafted tokens accepted ({accepted / max(1, drafted):.0%}),"
        f" {tokens / max(1, rounds):.2f} tokens per pass of the expert; the drafter gave"
        f" {lost:.0%} to tokens that the expert has not"
    )
