from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cascade.training import train as training
from cascade.training.corpus import (
    END,
    IGNORED,
    PAD,
    Batch,
    Part,
    batches,
    documents,
    encode,
    token_id,
    train_tokenizer,
)
from cascade.training.recipes import PAIR, Recipe
from cascade.training.train import (
    Workspace,
    answer_choices,
    answer_labels,
    answer_loss,
    distillation_loss,
    draw_curves,
    find_tokenizer,
    save,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TINY = Recipe(
    hidden=32,
    layers=1,
    heads=1,
    intermediate=32,
    steps=6,
    formal=0.5,
    documents=8,
    groups=2,
    learning_rate=4e-3,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Who is Anna? Anna lives in Rome."] * 20, size=300, context=64)


@pytest.fixture
def workspace(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Workspace:
    return Workspace(tokenizer=tokenizer, folder=tmp_path, seed=1)


def _same(one: LlamaForCausalLM, other: LlamaForCausalLM) -> bool:
    return all(
        torch.equal(first, second)
        for first, second in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_the_same_seed_gives_the_same_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (batches(tokenizer, TINY, seed="7") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens_BT, other.tokens_BT)
        assert torch.equal(one.labels_BT, other.labels_BT)


def test_only_answers_have_labels_and_each_ends_with_the_end_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    for batch in batches(tokenizer, replace(TINY, documents=32), seed="7"):
        labelled = batch.labels_BT != IGNORED
        assert torch.equal(batch.labels_BT[labelled], batch.tokens_BT[labelled])
        assert not (batch.tokens_BT[labelled] == pad).any()
        assert not labelled[:, 0].any()
        for labels, tokens in zip(batch.labels_BT, batch.tokens_BT, strict=True):
            assert labels[tokens != pad][-1] == end


def test_batches_hold_documents_of_similar_length(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = batches(tokenizer, replace(TINY, documents=32, groups=4), seed="7")
    widths = [batch.tokens_BT.shape[1] for batch in drawn]
    assert len(drawn) == 4
    assert widths == sorted(widths)


def test_a_label_is_a_choice_where_the_answer_could_continue_in_the_other_style() -> None:
    labels_BT = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED, 7], [IGNORED, 8, 9, 1, 2, 3]])
    is_choice_BT = torch.zeros_like(labels_BT).bool()
    is_choice_BT[0, 3] = is_choice_BT[1, 1] = True
    batch = Batch(labels_BT.clamp(min=0), labels_BT, is_choice_BT)
    assert answer_labels(batch).tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert answer_choices(batch).nonzero().flatten().tolist() == [1, 3]


def test_styles_diverge_at_the_first_token_that_differs(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where one style adds nothing, they diverge at the next part, at the latest the end token."""
    for document in islice(documents("7", formal=0.5), 200):
        encoded = encode(tokenizer, document)
        assert encoded.tokens == tokenizer.encode("".join(part.text for part in document))
        for end in (position for position, here in enumerate(encoded.is_choice) if here):
            before = str(tokenizer.decode(encoded.tokens[:end]))
            others = [_in_other_style(document, number) for number in _choices(document)]
            assert any(text.startswith(before) for text in others)


def _choices(document: Sequence[Part]) -> list[int]:
    return [number for number, part in enumerate(document) if part.alternative is not None]


def _in_other_style(document: Sequence[Part], number: int) -> str:
    texts = [part.text for part in document]
    return "".join([*texts[:number], document[number].alternative or "", *texts[number + 1 :]])


def test_an_interrupted_run_ends_with_the_same_weights(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 3)
    calls = iter(range(100))

    def interrupted(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return answer_loss(model, batch)

    whole = train("t", TINY, workspace=replace(workspace, folder=workspace.folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train("t", TINY, workspace=workspace, loss=interrupted)
    assert _same(whole, train("t", TINY, workspace=workspace))
    for folder in (workspace.folder, workspace.folder / "whole"):
        assert len(json.loads((folder / "t.losses.json").read_text())) == TINY.steps


def test_training_lowers_the_loss(workspace: Workspace) -> None:
    recipe = replace(TINY, steps=30, learning_rate=2e-2)
    batch = batches(workspace.tokenizer, TINY, seed="unseen")[0]
    start = train("start", replace(recipe, steps=0), workspace=workspace)
    after = train("after", recipe, workspace=workspace)
    with torch.no_grad():
        assert answer_loss(after, batch) < 0.8 * answer_loss(start, batch)


@pytest.fixture
def made(workspace: Workspace) -> Callable[[int], LlamaForCausalLM]:
    def new(seed: int) -> LlamaForCausalLM:
        return train(str(seed), replace(TINY, steps=0), workspace=replace(workspace, seed=seed))

    return new


def test_a_model_that_is_its_own_teacher_has_no_divergence(
    made: Callable[[int], LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """With share 1, only the choices of style have a loss."""
    model = made(1)
    batch = batches(tokenizer, TINY, seed="7")[0]
    loss = distillation_loss(model, batch, teacher=model, share=1.0)
    choices_BT = batch.labels_BT.masked_fill(~batch.is_choice_BT, IGNORED)
    expected = answer_loss(model, batch._replace(labels_BT=choices_BT))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_distillation_with_share_0_is_cross_entropy(
    made: Callable[[int], LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, teacher = made(1), made(2)
    batch = batches(tokenizer, TINY, seed="7")[0]
    loss = distillation_loss(model, batch, teacher=teacher, share=0.0)
    assert loss.item() == pytest.approx(answer_loss(model, batch).item(), rel=1e-5)


def test_a_saved_folder_can_be_loaded(workspace: Workspace) -> None:
    model = train("t", replace(TINY, steps=0), workspace=workspace)
    save(model, tokenizer=workspace.tokenizer, folder=workspace.folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(workspace.folder / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == token_id(workspace.tokenizer, END)
    vocabulary = AutoTokenizer.from_pretrained(workspace.folder / "model").get_vocab()
    assert vocabulary == workspace.tokenizer.get_vocab()


def test_an_existing_tokenizer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TOKENIZER_DOCUMENTS", 500)
    first = find_tokenizer(tmp_path / "tokenizer", size=300, seed=0)
    again = find_tokenizer(tmp_path / "tokenizer", size=400, seed=1)
    assert len(first) == 300
    assert again.get_vocab() == first.get_vocab()


def test_distilled_models_are_trained_after_the_expert() -> None:
    names = list(PAIR)
    distilled = [name for name, recipe in PAIR.items() if recipe.distilled]
    assert all(names.index(name) > names.index("expert") for name in distilled)


def test_the_curves_of_all_models_are_plotted(tmp_path: Path) -> None:
    for name in ("drafter", "expert"):
        losses = [3 / (1 + step) for step in range(60)]
        (tmp_path / f"{name}.losses.json").write_text(json.dumps(losses))
    picture = draw_curves(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
