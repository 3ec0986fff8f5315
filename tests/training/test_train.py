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
from cascade.training.curves import draw_curves, write_losses
from cascade.training.train import (
    PAIR,
    Distilled,
    PairRecipe,
    Recipe,
    Workshop,
    answer_labels,
    answer_loss,
    find_tokenizer,
    save,
    train,
    unstyled,
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
def workshop(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Workshop:
    return Workshop(tokenizer=tokenizer, folder=tmp_path, seed=1)


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


def test_only_answers_are_labelled_and_each_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    for batch in batches(tokenizer, replace(TINY, documents=32), seed="7"):
        labelled = batch.labels_BT != IGNORED
        assert torch.equal(batch.labels_BT[labelled], batch.tokens_BT[labelled])
        assert not (batch.tokens_BT[labelled] == pad).any()
        assert not labelled[:, 0].any()
        for labels, tokens in zip(batch.labels_BT, batch.tokens_BT, strict=True):
            assert labels[tokens != pad][-1] == end


def test_groups_hold_documents_of_like_length(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = batches(tokenizer, replace(TINY, documents=32, groups=4), seed="7")
    widths = [batch.tokens_BT.shape[1] for batch in drawn]
    assert len(drawn) == 4
    assert widths == sorted(widths)


def test_a_label_is_styled_where_the_answer_could_go_on_otherwise() -> None:
    labels_BT = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED, 7], [IGNORED, 8, 9, 1, 2, 3]])
    styled_BT = torch.zeros_like(labels_BT).bool()
    styled_BT[0, 3] = styled_BT[1, 1] = True
    batch = Batch(tokens_BT=labels_BT.clamp(min=0), labels_BT=labels_BT, styled_BT=styled_BT)
    assert answer_labels(batch).tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert unstyled(batch).tolist() == [1, 0, 1, 0, 1, 1, 1, 1]


def test_styles_part_at_the_first_token_that_differs(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where one style says nothing more, they part at what follows, at the latest the end."""
    for document in islice(documents("7", formal=0.5), 200):
        encoded = encode(tokenizer, document)
        assert encoded.tokens == tokenizer.encode("".join(part.text for part in document))
        for at in (place for place, styled in enumerate(encoded.styled) if styled):
            before = str(tokenizer.decode(encoded.tokens[:at]))
            others = [_otherwise(document, number) for number in _choices(document)]
            assert any(text.startswith(before) for text in others)


def _choices(document: Sequence[Part]) -> list[int]:
    return [number for number, part in enumerate(document) if part.other is not None]


def _otherwise(document: Sequence[Part], number: int) -> str:
    texts = [part.text for part in document]
    return "".join([*texts[:number], document[number].other or "", *texts[number + 1 :]])


def test_a_run_that_was_cut_ends_in_the_same_weights(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 3)
    calls = iter(range(100))

    def cut(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return answer_loss(model, batch)

    whole = train("t", TINY, workshop=replace(workshop, folder=workshop.folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train("t", TINY, workshop=workshop, loss=cut)
    assert _same(whole, train("t", TINY, workshop=workshop))
    for folder in (workshop.folder, workshop.folder / "whole"):
        assert len(json.loads((folder / "t.losses.json").read_text())) == TINY.steps


def test_learning_lowers_the_loss(workshop: Workshop) -> None:
    recipe = replace(TINY, steps=60, learning_rate=1e-2)
    batch = batches(workshop.tokenizer, TINY, seed="unseen")[0]
    start = train("start", replace(recipe, steps=0), workshop=workshop)
    after = train("after", recipe, workshop=workshop)
    with torch.no_grad():
        assert answer_loss(after, batch) < 0.8 * answer_loss(start, batch)


@pytest.fixture
def made(workshop: Workshop) -> Callable[[int], LlamaForCausalLM]:
    def new(seed: int) -> LlamaForCausalLM:
        return train(str(seed), replace(TINY, steps=0), workshop=replace(workshop, seed=seed))

    return new


def test_a_model_that_is_its_own_teacher_has_no_divergence(
    made: Callable[[int], LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """With the whole share distilled, only the choices of style are left to learn."""
    model = made(1)
    batch = batches(tokenizer, TINY, seed="7")[0]
    loss = Distilled(teacher=model, share=1.0)(model, batch)
    styled_BT = batch.labels_BT.masked_fill(~batch.styled_BT, IGNORED)
    wanted = answer_loss(model, replace(batch, labels_BT=styled_BT))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_nothing_distilled_is_plain_cross_entropy(
    made: Callable[[int], LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, teacher = made(1), made(2)
    batch = batches(tokenizer, TINY, seed="7")[0]
    loss = Distilled(teacher=teacher, share=0.0)(model, batch)
    assert loss.item() == pytest.approx(answer_loss(model, batch).item(), rel=1e-5)


def test_a_saved_folder_loads_by_path(workshop: Workshop) -> None:
    model = train("t", replace(TINY, steps=0), workshop=workshop)
    save(model, tokenizer=workshop.tokenizer, folder=workshop.folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(workshop.folder / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == token_id(workshop.tokenizer, END)
    vocabulary = AutoTokenizer.from_pretrained(workshop.folder / "model").get_vocab()
    assert vocabulary == workshop.tokenizer.get_vocab()


def test_a_tokenizer_that_is_there_is_kept(tmp_path: Path) -> None:
    small = PairRecipe(vocabulary=300, models={"drafter": TINY})
    first = find_tokenizer(tmp_path / "tokenizer", recipes=small, seed=0)
    again = find_tokenizer(tmp_path / "tokenizer", recipes=PAIR, seed=1)
    assert len(first) == 300
    assert again.get_vocab() == first.get_vocab()


def test_what_learns_from_the_expert_is_made_after_it() -> None:
    names = list(PAIR.models)
    distilled = [name for name, recipe in PAIR.models.items() if recipe.distilled]
    assert all(names.index(name) > names.index("expert") for name in distilled)


def test_the_curves_of_all_models_are_drawn(tmp_path: Path) -> None:
    for name in ("drafter", "expert"):
        write_losses(tmp_path, name=name, losses=[3 / (1 + step) for step in range(60)])
    picture = draw_curves(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
