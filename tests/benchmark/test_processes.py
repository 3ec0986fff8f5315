"""Tiers in processes of their own say what tiers in one process say."""

from __future__ import annotations

import os

import pytest

from cascade.benchmark.processes import routed, tier_processes
from cascade.errors import StartupError
from cascade.evaluation.client import InProcess, in_process
from cascade.settings import Application

BODY = {
    "messages": [{"role": "user", "content": "Who is Buzz Aldrin?"}],
    "temperature": 0,
    "max_tokens": 24,
    "cascade": {"draft_tokens": 3},
}


def settings(**expert: object) -> Application:
    engine = {"threads": 1}
    return Application.model_validate(
        {"drafter": {"engine": engine}, "expert": {"engine": engine, **expert}}
    )


async def test_three_processes_say_what_one_does_and_their_work_is_counted() -> None:
    one = min(os.sched_getaffinity(0))
    async with tier_processes(settings(), cores={"drafter": [one]}) as running:
        before_s = running.expert.cpu_s
        async with routed(
            settings(),
            drafter=running.drafter.address,
            expert=running.expert.address,
            token=running.token,
        ) as service:
            apart = await InProcess(service, name="apart").answer(BODY)
        assert os.sched_getaffinity(running.drafter.pid) == {one}
        pids = {running.drafter.pid, running.expert.pid, os.getpid()}
        assert running.expert.cpu_s >= before_s > 0
    assert len(pids) == 3
    async with in_process(settings()) as together:
        assert (await together.answer(BODY)).text == apart.text
    assert apart.statistics["drafted"] > 0


async def test_a_tier_that_does_not_start_is_told() -> None:
    with pytest.raises(StartupError, match="the expert ended before it served"):
        async with tier_processes(settings(model="nowhere")):
            raise AssertionError
