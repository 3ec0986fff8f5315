"""Pairs of real models, small enough to enumerate or to run on two cores, and servers over them."""

from __future__ import annotations

import os

# Read when torch and grpc are imported: two spinning teams of threads would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker has its core
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cascade.local import LocalServer, local_server
from cascade.router.circuit_breaker import CircuitBreaker
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from cascade.rules import Rule


pytest_plugins = ["tests.support.shipped_pair"]

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A model in a folder, and its plain forward pass."""

    path: Path
    model: LlamaForCausalLM
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict[tuple[int, ...], "Tensor"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits of the next token, without a cache of keys or a batch."""
        text = tuple(tokens)
        if text not in self._known:
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([text]), use_cache=False).logits
            self._known[text] = logits[0, -1].clone()
        return self._known[text]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A drafter and an expert in folders."""

    drafter: Folder
    expert: Folder

    def settings(self, **more: object) -> Application:
        """Return the settings that serve this pair."""
        engine = {"threads": 1}
        return Application.model_validate(
            {
                "drafter": {"model": str(self.drafter.path), "engine": engine},
                "expert": {"model": str(self.expert.path), "engine": engine},
                **more,
            }
        )


def words(count: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `count` one-letter words."""
    vocabulary = {chr(0x41 + number): number for number in range(count)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="A"))  # noqa: S106 - a word
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def random_model(  # noqa: PLR0913 - numbers of a configuration
    folder: Path, *, vocabulary: int, width: int, layers: int, seed: int, key_heads: int = 2
) -> Folder:
    """Write a random model whose distributions are neither flat nor one-hot."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    words(vocabulary).save_pretrained(folder)
    return Folder(path=folder, model=model.eval())


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two random models over eight words: sequences of two or three can be enumerated."""
    root = tmp_path_factory.mktemp("toy")
    return Pair(
        drafter=random_model(root / "drafter", vocabulary=8, width=16, layers=1, seed=1),
        expert=random_model(root / "expert", vocabulary=8, width=32, layers=2, seed=2),
    )


@pytest.fixture(scope="session")
async def toy_stack(toy: Pair) -> AsyncIterator[LocalServer]:
    """A server of the toy pair whose results do not depend on how busy the machine is.

    Its drafter is never late, and is asked even though almost all of its drafts are rejected.
    """
    async with AsyncExitStack() as stack:
        with mock.patch("cascade.router.router.CircuitBreaker", AlwaysClosed):
            starting = local_server(toy.settings(router={"draft_deadline_s": 120}))
            running = await stack.enter_async_context(starting)
        yield running


class AlwaysClosed(CircuitBreaker):
    """Never opens."""

    def allows(self, address: str, rule: Rule) -> bool:
        del address, rule
        return True
