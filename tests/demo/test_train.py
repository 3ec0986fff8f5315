from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cascade.demo import train as training
from cascade.demo.corpus import IGNORED, Batch, batches
from cascade.demo.train import Recipe, answer_loss
from cascade.demo.vocabulary import END, PAD, token_id, train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TINY = Recipe(
    hidden=32, layers=1, heads=1, intermediate=32, steps=6, formal=0.5, documents=8, groups=2
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Who is Anna? Anna lives in Rome."] * 20, size=300, context=64)


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_the_same_seed_gives_the_same_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (batches(tokenizer, seed="7", formal=0.5, size=4, count=2) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens_BT, other.tokens_BT)
        assert torch.equal(one.labels_BT, other.labels_BT)


def test_only_answers_are_labelled_and_each_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    for batch in batches(tokenizer, seed="7", formal=0.5, size=8, count=2):
        labelled = batch.labels_BT != IGNORED
        assert torch.equal(batch.labels_BT[labelled], batch.tokens_BT[labelled])
        assert not (batch.tokens_BT[labelled] == pad).any()
        assert not labelled[:, 0].any()
        for labels, tokens in zip(batch.labels_BT, batch.tokens_BT, strict=True):
            assert labels[tokens != pad][-1] == end


def test_batches_hold_documents_of_like_length(tokenizer: PreTrainedTokenizerFast) -> None:
    widths = [
        b.tokens_BT.shape[1] for b in batches(tokenizer, seed="7", formal=0.5, size=4, count=4)
    ]
    assert widths == sorted(widths)


def test_a_run_that_was_cut_ends_in_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_STEPS", 3)

    def run(folder: Path) -> dict[str, Any]:
        model = training.train("t", recipe=TINY, tokenizer=tokenizer, seed=1, folder=folder)
        return _weights(model)

    whole = run(tmp_path / "whole")
    calls = iter(range(100))

    def cut(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return answer_loss(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "answer_loss", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_learning_lowers_the_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    [batch] = batches(tokenizer, seed="unseen", formal=0.5, size=16, count=1)
    start, after = (
        training.train(str(steps), recipe=recipe, tokenizer=tokenizer, seed=1, folder=tmp_path)
        for steps in (0, 60)
        for recipe in [replace(TINY, steps=steps, learning_rate=1e-2)]
    )
    with torch.no_grad():
        assert answer_loss(after, batch) < 0.8 * answer_loss(start, batch)


def test_a_saved_folder_loads_by_path(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = training.train(
        "t", recipe=replace(TINY, steps=0), tokenizer=tokenizer, seed=1, folder=tmp_path
    )
    training.save(model, tokenizer=tokenizer, folder=tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == token_id(tokenizer, END)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
