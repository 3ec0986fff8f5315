"""From what a person asks of a benchmark to contenders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cascade.benchmark.load import Closed
from cascade.benchmark.plan import Apart, Here, Plan, execute, padded_expert, parse_ask, questions
from cascade.benchmark.synthetic_model import Shape, is_padded
from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks import Family, Level
from cascade.settings import Application

if TYPE_CHECKING:
    from pathlib import Path


def settings() -> Application:
    engine = {"threads": 1}
    return Application.model_validate(
        {
            "drafter": {"engine": engine},
            "expert": {"engine": engine},
            "router": {"draft_deadline_s": 120},
        }
    )


def plan(**changes: Any) -> Plan:
    plain: dict[str, Any] = {
        "settings": settings(),
        "bodies": questions(count=1, levels=[Level.EASY])[:2],
        "arrivals": Closed(concurrency=2),
        "rounds": 1,
    }
    return Plan(**(plain | changes))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("expert_only", {"mode": "expert_only"}),
        ("lossless", {"mode": "speculative", "rule": {"kind": "lossless"}, "draft_tokens": "auto"}),
        ("lossless@0", {"mode": "speculative", "rule": {"kind": "lossless"}, "draft_tokens": 0}),
        (
            "token_v3:0.9@4",
            {"mode": "cascade", "rule": {"kind": "token_v3", "alpha": 0.9}, "draft_tokens": 4},
        ),
        ("token_cascade:0.6", {"mode": "token_cascade", "rule": {"kind": "chow", "alpha": 0.6}}),
    ],
)
def test_a_way_of_asking_is_read(text: str, told: dict[str, Any]) -> None:
    assert parse_ask(text) == {"coupling": "maximal", **told}


@pytest.mark.parametrize("text", ["warp", "token_v3:high", "lossless@many", "token_v3:7", ""])
def test_what_is_no_way_of_asking_is_refused(text: str) -> None:
    with pytest.raises(InvalidMeasurement):
        parse_ask(text)


def test_questions_take_turns_between_families() -> None:
    asked = questions(count=2, levels=[Level.HARD])
    assert len(asked) == 8
    assert all(body["temperature"] == 0 for body in asked)
    assert len({body["messages"][0]["content"] for body in asked}) == 8


def test_more_questions_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="too small"):
        questions(count=10**6, levels=[Level.EASY], families=[Family.FACTS])


async def test_arrangements_and_peers_say_the_same_to_the_same_requests() -> None:
    contest = await execute(
        plan(
            asks=("expert_only", "lossless@3"),
            where=(Here(), Apart()),
            rtts_ms=(4.0,),
            peers=("batched", "continuous"),
        )
    )
    names = [standing.name for standing in contest.standings]
    assert names == [
        "expert_only, 4 ms", "lossless@3, 4 ms", "expert_only, apart, 4 ms",
        "lossless@3, apart, 4 ms", "transformers batched", "transformers continuous batching",
    ]  # fmt: skip
    assert not any(contest.differences(name, names[0]) for name in names)
    for name in ("lossless@3, 4 ms", "lossless@3, apart, 4 ms"):
        found = contest[name].middle
        assert found.busy.keys() == {"drafter", "expert"}
        assert found.acceptance is not None


async def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="no peer 'telepathy'"):
        await execute(plan(asks=(), peers=("telepathy",)))


def test_a_padded_expert_is_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = Shape(hidden=640, intermediate=1100, layers=7, heads=10, groups=10)

    def small(*_: object) -> Shape:
        return shape

    monkeypatch.setattr("cascade.benchmark.synthetic_model.shape_for", small)
    first = padded_expert(settings(), parameters="20M").expert.model_path
    weights = next(path for path in sorted(tmp_path.rglob("*.safetensors")))
    before = weights.stat().st_mtime_ns
    assert padded_expert(settings(), parameters="20M").expert.model_path == first
    assert weights.stat().st_mtime_ns == before
    assert is_padded(weights.parent)
