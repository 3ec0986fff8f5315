"""A model over several processes: exact, refused where it cannot be, and ended by any one's end."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import active_children
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tests.engine.architectures import build
from tests.engine.harness import EngineHarness, GreedyHandler
from tests.engine.test_exactness import TOLERANCE, ragged_scenario

from cascade.engine import tensor_parallel, tp_plan
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.sharded import ShardedRunner, pack, unpack
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Segment
from cascade.engine.engine import Engine
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import StartupError, Unavailable, UnsupportedModel
from cascade.types import SessionId

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Generator

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.tensor_parallel import RankTask

SLOW = pytest.mark.slow


def over(size: int, **more: Any) -> EngineSettings:
    """Return the settings of an engine over `size` processes."""
    return EngineSettings(tensor_parallel=size, cache_tokens=1024, threads=1, **more)


@contextmanager
def loaded(path: pathlib.Path, settings: EngineSettings) -> Generator[LoadedModel]:
    model = tensor_parallel.load(str(path), settings=settings)
    assert model.ranks is not None
    try:
        yield model
    finally:
        model.ranks.stop()


@pytest.mark.parametrize(
    ("name", "path", "runner"),
    [
        # The next test runs it with fewer key heads, and tests/integration with a server.
        pytest.param("llama", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("qwen3", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("gemma3", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("gemma3", Path.PADDED, PaddedRunner, marks=SLOW),
        pytest.param("mixtral", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("qwen3-moe", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("qwen3-moe", Path.PADDED, PaddedRunner, marks=SLOW),
        pytest.param("phi3", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("deepseek-v3", Path.AUTO, VarlenRunner, marks=SLOW),
        pytest.param("llama4", Path.AUTO, PaddedRunner, marks=SLOW),
        pytest.param("longrope", Path.AUTO, VarlenRunner, marks=SLOW),
    ],
)
def test_two_processes_give_the_logits_of_one(
    name: str, path: Path, runner: type[Any], tmp_path: pathlib.Path
) -> None:
    plain = build(name)
    plain.save_pretrained(tmp_path)
    settings = over(2, path=path)
    with loaded(tmp_path, settings) as model:
        harness = EngineHarness(plain, settings, loaded=model)

        ragged_scenario(harness)

        assert isinstance(harness.engine.runner, ShardedRunner)
        assert isinstance(harness.engine.runner.runner, runner)
        assert harness.worst < TOLERANCE
        assert harness.largest > 0.5, "the logits differ enough for an error to show"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_widths_and_vocabularies_need_not_divide(name: str, tmp_path: pathlib.Path) -> None:
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    plain = build(name, **shape, intermediate_size=97)
    plain.save_pretrained(tmp_path)
    settings = over(3)
    with loaded(tmp_path, settings) as model:
        harness = EngineHarness(plain, settings, loaded=model)

        ragged_scenario(harness)

        assert harness.worst < TOLERANCE


@pytest.mark.parametrize(
    ("name", "key_heads", "size"),
    [
        ("llama", 1, 2),
        pytest.param("llama", 2, 4, marks=SLOW),
        pytest.param("qwen2", 1, 2, marks=SLOW),
        pytest.param("qwen3", 1, 4, marks=SLOW),
        pytest.param("gemma3", 1, 2, marks=SLOW),
        pytest.param("gemma4", 1, 2, marks=SLOW),
        pytest.param("mixtral", 1, 2, marks=SLOW),
        pytest.param("llama4", 1, 2, marks=SLOW),
        pytest.param("phi", 2, 4, marks=SLOW),
    ],
)
def test_processes_share_key_heads_that_are_fewer(
    name: str, key_heads: int, size: int, tmp_path: pathlib.Path
) -> None:
    plain = build(name, num_key_value_heads=key_heads)
    plain.save_pretrained(tmp_path)
    settings = over(size)
    with loaded(tmp_path, settings) as model:
        harness = EngineHarness(plain, settings, loaded=model)

        ragged_scenario(harness)

        bytes_per_token = harness.engine.runner.pool.bytes_per_token
        assert harness.worst < TOLERANCE
        assert harness.largest > 0.5, "the logits differ enough for an error to show"
    alone = EngineHarness(plain, EngineSettings(cache_tokens=1024, path=settings.path))
    assert bytes_per_token * key_heads == alone.engine.runner.pool.bytes_per_token


@pytest.mark.slow
def test_a_full_cache_and_small_passes_change_nothing(tmp_path: pathlib.Path) -> None:
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    settings = EngineSettings(tensor_parallel=2, cache_tokens=512, max_step_tokens=16, threads=1)
    with loaded(tmp_path, settings) as model:
        harness = EngineHarness(plain, settings, loaded=model)

        ragged_scenario(harness)

        assert harness.worst < TOLERANCE
        assert harness.engine.stats().preemptions


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("phi3", 3)])
def test_the_end_of_one_process_ends_the_engine_and_fails_what_waits(
    name: str, size: int, tmp_path: pathlib.Path
) -> None:
    build(name).save_pretrained(tmp_path)
    settings = over(size)
    workers: list[tensor_parallel.Worker] = []

    def launch(task: RankTask) -> tensor_parallel.Worker:
        workers.append(tensor_parallel.Child(task))
        return workers[-1]

    model = tensor_parallel.load(str(tmp_path), settings=settings, launch=launch)
    handler = GreedyHandler(length=1_000_000)
    engine = Engine(model, handler=handler, settings=settings)
    engine.start()
    running, later = SessionId("running"), SessionId("later")
    engine.submit(
        ForwardRequest(share=NOBODYS, session=running, base=0, tokens=[3, 4, 5], num_logits=1)
    )
    assert handler.begun.wait(60)

    workers[-1].kill()
    assert handler.ended.acquire(timeout=60)
    engine.submit(ForwardRequest(share=NOBODYS, session=later, base=0, tokens=[3], num_logits=1))
    assert handler.ended.acquire(timeout=60)

    assert isinstance(handler.errors[running], Unavailable)
    assert isinstance(handler.errors[later], Unavailable)
    assert not engine.alive
    engine.stop()


class Ended:
    """A process that ends at once."""

    def __init__(self, task: RankTask) -> None:
        del task

    def wait(self) -> None:
        return

    def kill(self) -> None:
        return


def test_a_process_that_ends_while_the_model_loads_stops_the_start(
    tmp_path: pathlib.Path,
) -> None:
    build("llama").save_pretrained(tmp_path)

    with pytest.raises(StartupError, match="rank 1 of 2 has ended"):
        tensor_parallel.load(str(tmp_path), settings=over(2), launch=Ended)


@pytest.mark.slow
def test_what_one_process_finds_wrong_is_said(tmp_path: pathlib.Path) -> None:
    model = build("llama")
    # The columns of the second process.
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[:, -1] = float("nan")
    model.save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=r"NaN or infinite \(model.layers.0.mlp.down_proj"):
        tensor_parallel.load(str(tmp_path), settings=over(2))


@pytest.mark.slow
def test_a_process_runs_one_sharded_model_at_a_time(tmp_path: pathlib.Path) -> None:
    build("llama").save_pretrained(tmp_path)
    for _ in range(2):
        with (
            loaded(tmp_path, over(2)),
            pytest.raises(StartupError, match="already runs a sharded model"),
        ):
            tensor_parallel.load(str(tmp_path), settings=over(2))


@pytest.mark.parametrize(
    ("name", "shape", "size", "reason"),
    [
        ("gpt2", None, 2, r"no tensor parallel plan .*\(gpt2\).*pipeline.*on one device"),
        ("gpt-oss", None, 2, "no tensor parallel plan"),
        ("llama", (6, 3), 2, "has 6 attention heads and 3 key and value heads.* can be 1, 3, 6$"),
        ("qwen3", (12, 3), 4, "12 attention heads and 3 key .* can be 1, 3, 6, 12$"),
        ("llama", (4, 2), 3, "4 attention heads and 2 key .* which 3 devices .* can be 1, 2, 4$"),
        ("llama", (4, 2), 8, "which 8 devices cannot share evenly"),
        ("gpt-neox", (4, None), 3, "4 attention heads and 4 key .* can be 1, 2, 4$"),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(
    name: str, shape: tuple[int, int | None] | None, size: int, reason: str
) -> None:
    config = build(name).config
    if shape is not None:
        config.num_attention_heads, config.num_key_value_heads = shape
    with pytest.raises(UnsupportedModel, match=reason):
        tp_plan.check(name, config, size=size)


def test_quantised_weights_are_refused() -> None:
    config = build("llama").config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModel, match=r"is quantised \(fp8\).*on one device"):
        tp_plan.check("llama", config, size=2)


@pytest.mark.parametrize(
    ("name", "size"), [("llama", 2), ("llama", 4), ("phi3", 3), ("deepseek-v3", 3)]
)
def test_a_model_that_can_be_shared_is_not_refused(name: str, size: int) -> None:
    tp_plan.check(name, build(name).config, size=size)


def test_a_device_of_its_own_cannot_be_named(tmp_path: pathlib.Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"engine.device is 'cuda:1'.*leave engine.device"):
        tensor_parallel.load(str(tmp_path), settings=over(2, device="cuda:1"))


@pytest.mark.parametrize("path", ["lean", "captured"])
def test_paths_of_one_device_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match=f"path is {path}, which runs on one device"):
        TypeAdapter(EngineSettings).validate_python({"tensor_parallel": 2, "path": path})


@pytest.mark.slow
def test_a_process_that_hangs_delays_neither_the_watchdog_nor_the_end(
    tmp_path: pathlib.Path,
) -> None:
    build("llama").save_pretrained(tmp_path)
    settings, now_s = over(2), [0.0]
    model = tensor_parallel.load(str(tmp_path), settings=settings)
    (other,) = active_children()
    handler = GreedyHandler(length=1_000_000)
    engine = Engine(model, handler=handler, settings=settings, clock=lambda: now_s[0])
    engine.start()
    session = SessionId("running")
    engine.submit(
        ForwardRequest(share=NOBODYS, session=session, base=0, tokens=[3, 4, 5], num_logits=1)
    )
    assert handler.begun.wait(60)

    psutil.Process(other.pid).suspend()
    while engine.working_s < 120:  # a pass may have ended after the suspension
        now_s[0] += 120
    engine.stop()

    assert handler.ended.acquire(timeout=60)
    assert isinstance(handler.errors[session], Unavailable)
    assert not other.is_alive()


@pytest.mark.parametrize("size", [0, -1, 65])
def test_a_number_of_devices_has_bounds(size: int) -> None:
    with pytest.raises(ValidationError, match="tensor_parallel"):
        TypeAdapter(EngineSettings).validate_python({"tensor_parallel": size})


NUMBERS = st.integers(0, 2**40)
SEGMENTS = st.builds(
    Segment,
    start=NUMBERS,
    past=NUMBERS,
    tokens=st.lists(NUMBERS, max_size=5),
    num_logits=NUMBERS,
    rope_length=NUMBERS,
    first_position=st.none() | NUMBERS,
)


@given(st.lists(SEGMENTS, max_size=4))
def test_segments_survive_their_announcement(segments: list[Segment]) -> None:
    assert list(unpack(pack(segments))) == segments
