from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
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
from cascade.training.recipes import PAIRS, Architecture, Recipe
from cascade.training.train import (
    Workspace,
    answer_choices,
    answer_labels,
    answer_logits,
    answer_loss,
    distillation_loss,
    draw_curves,
    find_tokenizer,
    new_model,
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

TINY_T5 = replace(TINY, architecture=Architecture.SEQ2SEQ)

either = pytest.mark.parametrize("recipe", [TINY, TINY_T5], ids=list(Architecture))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Who is Anna? Anna lives in Rome."] * 20, size=300, context=64)


@pytest.fixture
def workspace(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Workspace:
    return Workspace(tokenizer=tokenizer, folder=tmp_path, seed=1)


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(
        torch.equal(first, second)
        for first, second in zip(one.parameters(), other.parameters(), strict=True)
    )


@either
def test_the_same_seed_gives_the_same_batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> None:
    first, second = (batches(tokenizer, recipe, seed="7") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))


@either
def test_only_answers_have_labels_and_each_ends_with_the_end_token(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> None:
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    for batch in batches(tokenizer, replace(recipe, documents=32), seed="7"):
        labelled = batch.labels_BT != IGNORED
        assert torch.equal(batch.labels_BT[labelled], batch.tokens_BT[labelled])
        assert not (batch.tokens_BT[labelled] == pad).any()
        assert not labelled[:, 0].any()
        for labels, tokens in zip(batch.labels_BT, batch.tokens_BT, strict=True):
            assert labels[tokens != pad][-1] == end


def test_an_encoder_reads_the_question_and_the_decoder_the_answer_after_a_start_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [question, *answer] = next(documents("7", formal=0.5, architecture=Architecture.SEQ2SEQ))
    encoded = encode(tokenizer, [question, *answer], architecture=Architecture.SEQ2SEQ)
    pad, end = token_id(tokenizer, PAD), token_id(tokenizer, END)
    assert tokenizer.decode(encoded.source) == question.text
    assert encoded.source[-1] == end
    assert tokenizer.decode(encoded.tokens[1:]) == "".join(part.text for part in answer)
    assert encoded.tokens[0] == pad
    assert encoded.labels == [IGNORED, *encoded.tokens[1:]]


def test_the_padding_of_a_source_changes_no_logit(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(TINY_T5, tokenizer=tokenizer)
    batch = batches(tokenizer, replace(TINY_T5, documents=1, groups=1), seed="7")[0]
    padding = torch.full((1, 5), token_id(tokenizer, PAD))
    padded = batch._replace(source_BS=torch.cat([batch.source_BS, padding], dim=1))
    with torch.no_grad():
        expected = answer_logits(model, batch)
        torch.testing.assert_close(answer_logits(model, padded), expected)


def test_batches_hold_documents_of_similar_length(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = batches(tokenizer, replace(TINY, documents=32, groups=4), seed="7")
    widths = [batch.tokens_BT.shape[1] for batch in drawn]
    assert len(drawn) == 4
    assert widths == sorted(widths)


def test_a_label_is_a_choice_where_the_answer_could_continue_in_the_other_style() -> None:
    labels_BT = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED, 7], [IGNORED, 8, 9, 1, 2, 3]])
    is_choice_BT = torch.zeros_like(labels_BT).bool()
    is_choice_BT[0, 3] = is_choice_BT[1, 1] = True
    source_BS = torch.empty(2, 0, dtype=torch.long)
    batch = Batch(labels_BT.clamp(min=0), labels_BT, is_choice_BT, source_BS)
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


@either
def test_an_interrupted_run_ends_with_the_same_weights(
    workspace: Workspace, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 3)
    calls = iter(range(100))

    def interrupted(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return answer_loss(model, batch)

    whole = train("t", recipe, workspace=replace(workspace, folder=workspace.folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train("t", recipe, workspace=workspace, loss=interrupted)
    assert _same(whole, train("t", recipe, workspace=workspace))
    for folder in (workspace.folder, workspace.folder / "whole"):
        assert len(json.loads((folder / "t.losses.json").read_text())) == recipe.steps


@either
def test_training_lowers_the_loss(workspace: Workspace, recipe: Recipe) -> None:
    recipe = replace(recipe, steps=30, learning_rate=2e-2)
    batch = batches(workspace.tokenizer, recipe, seed="unseen")[0]
    start = train("start", replace(recipe, steps=0), workspace=workspace)
    after = train("after", recipe, workspace=workspace)
    with torch.no_grad():
        assert answer_loss(after, batch) < 0.85 * answer_loss(start, batch)


@pytest.fixture
def made(workspace: Workspace) -> Callable[[int, Recipe], PreTrainedModel]:
    def new(seed: int, recipe: Recipe) -> PreTrainedModel:
        return train(str(seed), replace(recipe, steps=0), workspace=replace(workspace, seed=seed))

    return new


@either
def test_a_model_that_is_its_own_teacher_has_no_divergence(
    made: Callable[[int, Recipe], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    """With share 1, only the choices of style have a loss."""
    model = made(1, recipe)
    batch = batches(tokenizer, recipe, seed="7")[0]
    loss = distillation_loss(model, batch, teacher=model, share=1.0)
    choices_BT = batch.labels_BT.masked_fill(~batch.is_choice_BT, IGNORED)
    expected = answer_loss(model, batch._replace(labels_BT=choices_BT))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@either
def test_distillation_with_share_0_is_cross_entropy(
    made: Callable[[int, Recipe], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    model, teacher = made(1, recipe), made(2, recipe)
    batch = batches(tokenizer, recipe, seed="7")[0]
    loss = distillation_loss(model, batch, teacher=teacher, share=0.0)
    assert loss.item() == pytest.approx(answer_loss(model, batch).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "auto", "kind"),
    [
        (TINY, AutoModelForCausalLM, LlamaForCausalLM),
        (TINY_T5, AutoModelForSeq2SeqLM, T5ForConditionalGeneration),
    ],
    ids=list(Architecture),
)
def test_a_saved_folder_can_be_loaded(
    workspace: Workspace, recipe: Recipe, auto: Any, kind: type[PreTrainedModel]
) -> None:
    model = train("t", replace(recipe, steps=0), workspace=workspace)
    save(model, tokenizer=workspace.tokenizer, folder=workspace.folder / "model")
    loaded = auto.from_pretrained(workspace.folder / "model")
    assert type(loaded) is kind
    assert _same(loaded, model)
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
    for pair in PAIRS.values():
        names = list(pair)
        distilled = [name for name, recipe in pair.items() if recipe.distilled]
        assert all(names.index(name) > names.index("expert") for name in distilled)


def test_a_model_has_the_architecture_of_its_pair() -> None:
    for architecture, pair in PAIRS.items():
        assert {recipe.architecture for recipe in pair.values()} == {architecture}


def test_the_curves_of_all_models_are_plotted(tmp_path: Path) -> None:
    for name in ("drafter", "expert"):
        losses = [3 / (1 + step) for step in range(60)]
        (tmp_path / f"{name}.losses.json").write_text(json.dumps(losses))
    picture = draw_curves(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
