from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.engine.harness import RecordingHandler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from cascade.engine.backends.prepacked_linear import (
    FIXED_ROWS,
    fix_batches,
    kernel_rows,
    pack,
    packed,
)
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

TOKENS = [3 + 7 * index % 200 for index in range(40)]


BOTH = (torch.float32, torch.bfloat16)


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, dtype)
    return model.eval()


def gpt2(dtype: torch.dtype = torch.bfloat16) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=4))
    nn.Module.to(model, dtype)
    return model.eval()


packs = pytest.mark.skipif(not pack(llama()), reason="this CPU has no bfloat16 kernels")


@packs
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_a_packed_model_computes_what_it_did(
    build: Callable[..., PreTrainedModel], dtype: torch.dtype, share: float
) -> None:
    plain, packed = build(dtype), build(dtype)
    assert pack(packed)
    tokens = torch.tensor([TOKENS])

    with torch.inference_mode():
        difference = (plain(tokens).logits - packed(tokens).logits).abs().max()
        assert difference < share * plain(tokens).logits.abs().max()


class _CountAlive(TorchDispatchMode):
    """Counts the matrices of layers that are alive whenever one is packed."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self._weights = [weakref.ref(layer.weight) for layer in layers]
        self.alive: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_reorder_linear_weight" in str(func):
            self.alive.append(sum(weight() is not None for weight in self._weights))
        return func(*args, **(kwargs or {}))


@packs
@pytest.mark.parametrize("build", [llama, gpt2])
def test_at_most_one_layer_is_held_twice(build: Callable[..., PreTrainedModel]) -> None:
    plain, model = build(torch.float32), build(torch.float32)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    own = head.weight is not embedding.weight
    found: list[Any] = [one for one in model.modules() if type(one) in {nn.Linear, Conv1D}]
    # Small matrices are not packed, and the embedding is needed.
    layers = [one for one in found if one.weight.numel() >= 2**14 and (own or one is not head)]
    with _CountAlive(layers) as counter:
        count = pack(model, consume=True)

    assert counter.alive[: len(layers)] == list(range(len(layers), 0, -1))
    assert count == len(counter.alive) == len(layers) + (not own)
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


class _ReadsMatrix(LlamaForCausalLM):
    """A model that needs a matrix for more than its layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = output.logits + self.lm_head.weight.mean()
        return output


def test_matrices_that_the_model_reads_itself_are_kept() -> None:
    model = _ReadsMatrix(llama(torch.float32).config).eval()
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        before = model(ids).logits
        assert pack(model, consume=True) > 0
        assert not any(weight.is_meta for weight in model.parameters())
        torch.testing.assert_close(model(ids).logits, before)


def test_other_precisions_are_not_packed() -> None:
    assert pack(llama(torch.float16)) == 0


@packs
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("columns", [64, 1024, 1536])
def test_deterministic_layers_do_not_depend_on_the_batch(dtype: torch.dtype, columns: int) -> None:
    """Beyond 1024 columns the kernels sum one vector in another order than several."""
    chance = torch.Generator().manual_seed(0)
    weight_OK = torch.randn(96, columns, generator=chance).to(dtype)
    inputs_NK = torch.randn(70, columns, generator=chance).to(dtype)
    linear = packed(weight_OK, deterministic=True)

    alone_NO = torch.cat([linear(vector) for vector in inputs_NK.split(1)])

    for size in (2, 3, 31, 32, 33, 70):
        assert torch.equal(torch.cat([linear(some) for some in inputs_NK.split(size)]), alone_NO)
    assert linear(inputs_NK[:0]).shape == (0, 96)


@packs
@pytest.mark.parametrize("dtype", BOTH)
def test_any_number_of_vectors_is_multiplied(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    weight_OK, inputs_NK = (torch.randn(n, 256, generator=chance).to(dtype) for n in (96, 300))
    bias_O = torch.randn(96, generator=chance).to(dtype)
    multiply = packed(weight_OK, bias_O)
    for count in (0, 1, 16, 17, 33, 65, 129, 300):
        some_NK = inputs_NK[:count]
        expected_NO = nn.functional.linear(some_NK, weight_OK, bias_O)
        torch.testing.assert_close(multiply(some_NK), expected_NO, rtol=0.02, atol=1e-3)


def test_kernels_are_for_few_numbers_of_vectors_and_compute_little_in_vain() -> None:
    rows = {count: kernel_rows(count) for count in range(513)}
    assert all(count <= rows[count] <= count * 9 / 8 for count in rows)
    assert len(set(rows.values())) == 57


def logits_of(
    engine: Engine, handler: RecordingHandler, session: str, *, first: int, count: int
) -> torch.Tensor:
    tokens = TOKENS[first : first + count]
    request = ForwardRequest(
        share=NOBODYS, session=SessionId(session), base=first, tokens=tokens, num_logits=count
    )
    received = handler.expect(request, context=[])
    engine.submit(request)
    while not received.ended:
        engine.step()
    return torch.stack(received.logits)


@packs
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype", BOTH)
def test_blocks_beside_others_have_the_same_bits_as_single_tokens(
    build: Callable[..., PreTrainedModel], dtype: torch.dtype
) -> None:
    """Deterministic logits do not depend on the block length, for Linear and Conv1D layers."""
    handler = RecordingHandler()
    settings = EngineSettings(cache_tokens=2048, deterministic=True, prefix_reuse=False)
    engine = Engine(adopt(build(dtype)), handler=handler, settings=settings)
    logits_of(engine, handler, "alone", first=0, count=20)
    alone = torch.cat(
        [logits_of(engine, handler, "alone", first=start, count=1) for start in range(20, 40)]
    )

    for other in range(9):
        logits_of(engine, handler, f"other {other}", first=0, count=11 + other)
    logits_of(engine, handler, "block", first=0, count=20)
    blocks: list[torch.Tensor] = []
    for start in range(20, 40, 5):
        for other in range(9):
            request = ForwardRequest(
                share=NOBODYS,
                session=SessionId(f"other {other}"),
                base=5,
                tokens=TOKENS[:6],
                num_logits=6,
            )
            handler.expect(request, context=[])
            engine.submit(request)
        blocks.append(logits_of(engine, handler, "block", first=start, count=5))

    assert torch.equal(torch.cat(blocks), alone)
    assert max(map(len, handler.passes)) == 10


class _Coded(torch.Tensor):
    """A weight of a class of its own, as those of quantised layers are."""


def test_weights_of_other_classes_are_left_alone() -> None:
    layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    layers[1].weight = nn.Parameter(torch.Tensor._make_subclass(_Coded, torch.zeros(256, 256)))

    assert pack(layers) == 1
    assert "forward" not in vars(layers[1])


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype", BOTH)
def test_layers_of_fixed_batches_compute_each_vector_as_if_it_were_alone(
    build: Callable[..., PreTrainedModel], dtype: torch.dtype
) -> None:
    plain, fixed = build(dtype), build(dtype)
    fix_batches(fixed)
    names = [name for name, layer in fixed.named_modules() if "forward" in vars(layer)]
    assert len(names) > 4
    for name in names:
        one, two = plain.get_submodule(name), fixed.get_submodule(name)
        width = one.nx if isinstance(one, Conv1D) else one.in_features
        assert isinstance(width, int)
        vectors = torch.randn(FIXED_ROWS + 7, width, dtype=dtype)
        with torch.inference_mode():
            together = two(vectors)
            torch.testing.assert_close(together, one(vectors))
            for index in (0, 5, FIXED_ROWS - 1, FIXED_ROWS, FIXED_ROWS + 6):
                assert torch.equal(two(vectors[index : index + 1])[0], together[index])
                assert torch.equal(two(vectors[None, index:])[0, 0], together[index])
