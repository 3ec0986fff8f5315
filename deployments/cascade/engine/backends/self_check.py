"""Prove at load that a path gives the logits of the model's plain forward pass.

A short story of prefills, blocks and a rollback runs on the whole model. Then every length at which
the model may change what it does is crossed, if this replica's cache holds sessions of that length:
windows and chunks by a long session, original RoPE lengths by a few tokens at those positions. Both
need the first layers only, as many as include one of every kind.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from cascade.engine import encoder_decoder
from cascade.engine.backends.base import (
    PathUnsupported,
    RopeLengths,
    Runner,
    boundaries,
    find_rope_lengths,
    reset_rope,
)
from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
from cascade.engine.backends.mask_probe import layers_of_every_kind, original_attention
from cascade.engine.batch import Segment
from cascade.engine.kv_cache import common_prefix
from cascade.engine.kv_pool import MIN_RANGE, capacity_tokens
from cascade.engine.model_loader import context_length
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.settings import EngineSettings

# Largest error of a token's logits, as a share of the largest logit, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.1}

# In half precision a near tie in the routing of a mixture of experts may change for a few tokens.
_HALF_QUANTILE = 0.75
_FEW_IDS = 50  # fewer than any vocabulary has
_CHUNK = 512  # tokens of a long session in one pass
_AROUND = 6  # tokens on each side of an original RoPE length


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The first `end` tokens of a text in a session; the last `count` of them need logits."""

    session: int
    text: tuple[int, ...]
    end: int
    count: int
    first_position: int = 0
    source: tuple[int, ...] = ()  # what an encoder reads

    @property
    def rows(self) -> range:
        """Return the indices of the tokens that need logits."""
        return range(self.end - self.count, self.end)

    def runs(self, lengths: RopeLengths) -> Iterator[tuple[range, int]]:
        """Yield the rows in runs of one RoPE length, and that length."""
        first = self.first_position
        for run, rope_length in lengths.runs(range(self.rows.start + first, self.end + first)):
            yield range(run.start - first, run.stop - first), rope_length


# Blocks in groups that run together; all their logits are compared as one.
_Section: TypeAlias = "Sequence[Sequence[_Block]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Story:
    """What a path has to compute, and the logits `[N, V]` of plain passes for each section."""

    sections: Sequence[_Section]
    expected: Sequence[Tensor]
    where: str = ""  # for messages

    @property
    def blocks(self) -> Iterator[_Block]:
        """Yield all blocks."""
        return (block for section in self.sections for group in section for block in group)


class SelfCheck:
    """The stories of one model.

    Args:
        model: The model, with the attention function that it was loaded with.
        settings: Of the engine that will run it.

    Raises:
        UnsupportedModel: The model needs more than token ids.
    """

    def __init__(self, model: PreTrainedModel, *, settings: EngineSettings) -> None:
        self._model = model
        self._settings = settings
        self._arguments = inspect.signature(model.forward).parameters
        self._encodes = bool(model.config.is_encoder_decoder)
        self._layers: int | None = 0  # of every kind
        self._beyond: list[_Story] | None = None  # the boundaries
        try:
            self._lengths = find_rope_lengths(model)
            self._short = self._story([self._short_section()])
        # As in `passed`: any failure means that the model needs more than tokens.
        except Exception as error:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot run on token ids alone ({_in_a_line(error)}); "
                "serve a language model that reads text alone"
            ) from error

    def passed(
        self, build: Callable[[], Runner[Any]], *, convert: Callable[[], Runner[Any]] | None = None
    ) -> Runner[Any]:
        """Return the runner that `build` makes, if it passes.

        Args:
            build: Builds a runner.
            convert: Builds one like it out of the model's weights, which are gone then. So a runner
                of the first layers has to pass before.

        Raises:
            PathUnsupported: It does not, or cannot be built.
            UnsupportedModel: It does not, and the weights are gone.
        """
        try:
            runner = self._passed_cut(build) if convert else build()
            if convert is None:
                _play(runner, self._short)
            if self._beyond is None:
                self._beyond = self._stories_beyond(runner)
            if self._beyond:
                with _first_layers(self._model, self._layers):
                    cut = build()
                    for story in self._beyond:
                        _play(cut, story)
                    del cut
            if convert:
                del runner
                runner = self._converted(convert)
            if self._settings.deterministic:
                _check_batch_invariance(runner)
        except (PathUnsupported, UnsupportedModel):
            raise
        # Unknown model code may fail in any way, and each means that this path cannot serve it.
        except Exception as error:
            raise PathUnsupported(f"it fails with {_in_a_line(error)}") from error
        return runner

    @property
    def _size(self) -> int:
        """Return how many token ids the stories use."""
        return min(int(self._model.config.get_text_config(decoder=True).vocab_size), 1000)

    def _passed_cut(self, build: Callable[[], Runner[Any]]) -> Runner[Any]:
        """Return a runner of the first layers that has passed the short story."""
        with _first_layers(self._model, layers_of_every_kind(self._model)):
            runner = build()
            _play(runner, self._story([self._short_section()]))
        return runner

    def _short_section(self) -> _Section:
        return [
            [self._with_source(block) for block in group] for group in _short_section(self._size)
        ]

    def _with_source(self, block: _Block) -> _Block:
        """Return the block of a session that has a source, if the model has an encoder."""
        if not self._encodes:
            return block
        count = 29 - 16 * block.session
        source = tuple((5 * i + 7 + block.session) % self._size for i in range(count))
        return replace(block, source=source)

    def _converted(self, convert: Callable[[], Runner[Any]]) -> Runner[Any]:
        """Return the runner that takes the model's weights, once it has passed the short story."""
        runner = convert()
        try:
            _play(runner, self._short)
        except PathUnsupported as error:
            raise UnsupportedModel(
                f"The first layers of {type(self._model).__name__} are computed exactly, but not "
                f"all of them ({error}); set engine.path to flat"
            ) from error
        return runner

    def _stories_beyond(self, runner: Runner[Any]) -> list[_Story]:
        """Return the stories that cross the boundaries within the model's context and the cache."""
        context = context_length(self._model.config)
        if self._encodes:
            context = encoder_decoder.lengths(self._model.config, self._settings).answer
        limit = capacity_tokens(
            self._settings,
            device=runner.device,
            bytes_per_token=runner.pool.bytes_per_token,
            context_length=context,
        )
        limit = min(limit, context or limit)
        named = boundaries(self._model.config, below=limit)
        if not (named.attention or named.position):
            return []
        stories: list[_Story] = []
        config: Any = self._model.config
        attention = config._attn_implementation  # noqa: SLF001 - as in `original_attention`
        self._model.set_attn_implementation(original_attention(self._model))
        self._layers = None if self._encodes else layers_of_every_kind(self._model)
        with _first_layers(self._model, self._layers):
            if named.attention:
                sections: Sequence[_Section] = [
                    [[self._with_source(block) for block in group] for group in section]
                    for section in _long_sections(named.attention, limit=limit, size=self._size)
                ]
                where = f" beyond {named.attention[-1]} tokens"
                stories.append(self._story(sections, where=where))
            if named.position and "position_ids" in self._arguments:
                sections = _position_sections(named.position, limit=limit, size=self._size)
                where = f" around positions {', '.join(map(str, named.position))}"
                stories.append(self._story(sections, where=where, alone=True))
        self._model.set_attn_implementation(attention)
        return stories

    def _story(
        self, sections: Sequence[_Section], *, where: str = "", alone: bool = False
    ) -> _Story:
        """Return a story of blocks, with the logits that plain passes give.

        Args:
            sections: The blocks.
            where: For messages.
            alone: Each token has its own pass, whatever its RoPE length is said to be.
        """
        story = _Story(sections=sections, expected=(), where=where)
        # One pass has all rows of a text that share their RoPE length.
        passes: defaultdict[tuple[Any, ...], set[int]] = defaultdict(set)
        for block in story.blocks:
            apart = ((range(row, row + 1), row) for row in block.rows)
            for run, key in apart if alone else block.runs(self._lengths):
                passes[block.text, block.source, block.first_position, key].update(run)
        found: dict[tuple[Any, ...], Tensor] = {}
        for (text, source, first_position, _), rows in passes.items():
            ordered = sorted(rows)
            logits_NV = self._plain_logits(
                text, ordered, first_position=first_position, source=source
            )
            for row, logits_V in zip(ordered, logits_NV, strict=True):
                found[text, source, first_position, row] = logits_V
        expected = [
            torch.stack(
                [
                    found[block.text, block.source, block.first_position, row]
                    for block in chain.from_iterable(section)
                    for row in block.rows
                ]
            )
            for section in sections
        ]
        return replace(story, expected=expected)

    def _plain_logits(
        self,
        text: Sequence[int],
        rows: Sequence[int],
        *,
        first_position: int,
        source: Sequence[int],
    ) -> Tensor:
        """Return the logits of ascending rows `[N, V]`, by a plain pass up to the last of them."""
        reset_rope(self._model)
        device = self._model.device
        ids_1T = torch.tensor([text[: rows[-1] + 1]], device=device)
        more: dict[str, Any] = {}
        if first_position:
            positions_T = first_position + torch.arange(ids_1T.shape[1], device=device)
            more["position_ids"] = positions_T[None]
        kept = torch.tensor(rows, device=device)
        slices = "logits_to_keep" in self._arguments
        if slices:
            more["logits_to_keep"] = kept
        more |= {"input_ids": ids_1T}
        if source:
            more |= {
                "input_ids": torch.tensor([source], device=device),
                "decoder_input_ids": ids_1T,
            }
        with torch.inference_mode():
            logits_TV: Tensor = self._model(use_cache=False, **more).logits[0]
        return logits_TV if slices else logits_TV[kept]


class _Replay:
    """Runs blocks as the engine does: in chunks, and only what is not cached of a session."""

    def __init__(self, runner: Runner[Any], story: _Story) -> None:
        self._runner = runner
        self._slots = max(MIN_RANGE, *(block.end for block in story.blocks))
        sessions = 1 + max(block.session for block in story.blocks)
        self._sources: dict[tuple[int, ...], range] = {}
        if isinstance(runner, EncoderDecoderRunner):
            sources = dict.fromkeys(block.source for block in story.blocks)
            runner.resize(num_slots=sessions * self._slots, source_slots=sum(map(len, sources)))
            for source in sources:
                start = sum(map(len, self._sources))
                self._sources[source] = range(start, start + len(source))
                runner.encode(source, slots=self._sources[source])
        else:
            runner.resize(num_slots=sessions * self._slots)
        self._cached: dict[int, tuple[tuple[int, ...], int]] = {}  # tokens, and their RoPE length

    def run(self, group: Sequence[_Block]) -> Tensor:
        """Return the logits of blocks that run together, `[N, V]`."""
        rows: list[list[Tensor]] = [[] for _ in group]
        for segments in zip_longest(*map(self._segments, group)):
            waiting = [(index, segment) for index, segment in enumerate(segments) if segment]
            for one_pass in self._runner.split([segment for _, segment in waiting]):
                owners, parts = zip(*[waiting[index] for index in one_pass], strict=True)
                logits_NV = self._runner.forward(parts)
                split = logits_NV.split([segment.num_logits for segment in parts])
                for owner, own_NV in zip(owners, split, strict=True):
                    rows[owner].append(own_NV)
        return torch.cat(list(chain.from_iterable(rows)))

    def _segments(self, block: _Block) -> Iterator[Segment]:
        known, known_rope = self._cached.get(block.session, ((), 0))
        for run, rope_length in block.runs(self._runner.rope_lengths):
            same = common_prefix(known, block.text) if rope_length == known_rope else 0
            past = min(same, run.start)
            for end in (*range(past + _CHUNK, run.start, _CHUNK), run.start, run.stop):
                if end > past:
                    yield Segment(
                        start=block.session * self._slots,
                        past=past,
                        tokens=block.text[past:end],
                        num_logits=max(0, end - run.start),
                        rope_length=rope_length,
                        first_position=block.first_position + past,
                        source=self._sources.get(block.source),
                    )
                past = end
            known, known_rope = block.text[: run.stop], rope_length
        self._cached[block.session] = known, known_rope


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _play(runner: Runner[Any], story: _Story) -> None:
    """Raise PathUnsupported if a runner does not compute what a story expects."""
    with torch.inference_mode():
        replay = _Replay(runner, story)
        for section, expected_NV in zip(story.sections, story.expected, strict=True):
            actual_NV = torch.cat([replay.run(group) for group in section])
            _compare(actual_NV, expected_NV, where=story.where)


@contextmanager
def _first_layers(model: PreTrainedModel, count: int | None) -> Generator[None]:
    """Leave `model` only its first layers; None leaves it all."""
    if count is None:
        yield
        return
    config: Any = model.config.get_text_config(decoder=True)
    total = int(config.num_hidden_layers)
    found = (
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    )
    # Layers may hold lists of that length in turn; the first is outside of them.
    owner, name, layers = next(found, (model, "", None))
    if layers is None:
        yield
        return
    setattr(owner, name, layers[:count])
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _short_section(size: int) -> _Section:
    """Return passes over two sessions: mixed, after a rollback of three tokens, of one token."""
    first = tuple((7 * i + 3) % size for i in range(26))
    wrong = (*first[:21], *((11 * i + 5) % size for i in range(3)))
    second = tuple((13 * i + 2) % size for i in range(11))
    groups = [
        [(0, 0, first, 20)],
        [(0, 20, wrong, 24), (1, 0, second, 8)],
        [(0, 21, first, 24), (1, 8, second, 10)],
        [(0, 24, first, 25), (1, 10, second, 11)],
        [(0, 25, first, 26)],
    ]
    return [
        [
            _Block(session=session, text=text, end=end, count=end - start)
            for session, start, text, end in group
        ]
        for group in groups
    ]


def _long_sections(lengths: Sequence[int], *, limit: int, size: int) -> list[_Section]:
    """Return a session that crosses every length, the last one by a quarter, and one beside it.

    The tokens that a window of that length does not see differ from those it sees, or it would not
    matter much whether they are seen.
    """
    most = min(limit, lengths[-1] + lengths[-1] // 4 + 8)
    unseen = most - lengths[-1]
    text = tuple((3 + i % 2 if i < unseen else 5 + 7 * i % 11) % size for i in range(most))
    other = tuple((13 * i + 2) % size for i in range(31))

    def block(end: int, count: int, session: int = 0) -> _Block:
        own = (text, other)[session]
        return _Block(session=session, text=own, end=min(end, most), count=min(count, end))

    across: list[_Section] = [[[block(length + 2, 4)]] for length in lengths]
    end: _Section = [
        [block(most - 2, 5), block(30, 6, 1)],
        [block(most - 1, 1), block(31, 1, 1)],
        [block(most, 1)],
    ]
    return [*across, end]


def _position_sections(positions: Sequence[int], *, limit: int, size: int) -> list[_Section]:
    """Return a few tokens around each position, and a session at the usual ones beside them."""
    text = tuple((7 * i + 3) % size for i in range(2 * _AROUND))
    other = _Block(session=0, text=tuple((13 * i + 2) % size for i in range(20)), end=20, count=5)
    sections: list[_Section] = []
    for session, position in enumerate(positions, start=1):
        first = max(0, position - _AROUND)
        count = min(len(text), limit - first)
        around = _Block(session=session, text=text, end=count, count=count, first_position=first)
        sections.append([[around, other]])
    return sections


def _compare(actual_NV: Tensor, expected_NV: Tensor, *, where: str) -> None:
    tolerance = _TOLERANCE.get(expected_NV.dtype, 0.1)
    full_precision = expected_NV.dtype in {torch.float32, torch.float64}
    actual_NV, expected_NV = actual_NV.float(), expected_NV.float()
    largest_N = expected_NV.abs().amax(-1).clamp(min=1e-6)
    error_N = (actual_NV - expected_NV).abs().amax(-1) / largest_N
    error = float(error_N.max() if full_precision else error_N.quantile(_HALF_QUANTILE))
    if not error <= tolerance:
        raise PathUnsupported(
            f"its logits{where} differ from the plain forward pass by {error:.1e} of the largest "
            f"logit (allowed {tolerance:.0e})"
        )


def _check_batch_invariance(runner: Runner[Any]) -> None:
    """Raise PathUnsupported unless logits are the same to the bit alone and beside others."""
    first = tuple((7 * i + 3) % _FEW_IDS for i in range(26))
    other = tuple((13 * i + 2) % _FEW_IDS for i in range(37))
    prompt = Segment(start=0, past=0, tokens=first[:20])
    block = Segment(start=0, past=20, tokens=first[20:], num_logits=6)
    with torch.inference_mode():
        runner.forward([prompt])
        singles = [
            Segment(start=0, past=i, tokens=first[i:][:1], num_logits=1) for i in range(20, 26)
        ]
        alone_NV = torch.cat([runner.forward([single]) for single in singles])
        for tokens in (other[:3], other):
            beside = Segment(start=MIN_RANGE, past=0, tokens=tokens, num_logits=1)
            runner.forward([prompt, beside])
            if not torch.equal(runner.forward([block, beside])[:6], alone_NV):
                raise PathUnsupported(
                    "on this device its logits depend on the batch; leave engine.deterministic out"
                )
