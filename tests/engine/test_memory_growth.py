from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
from tests.engine.harness import GreedyHandler

from cascade.demo import DRAFTER
from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import load
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.types import SessionId

MIB = 2**20


def serve_mixed_prompts(rounds: list[int]) -> list[int]:
    """Return the bytes of this process after so many rounds of sessions of all lengths."""
    os.environ.update(threads.environment(threads=1))
    handler = GreedyHandler(length=8)
    settings = EngineSettings(threads=1, cache_tokens=2**14)
    engine = Engine(load(str(DRAFTER)), handler=handler, settings=settings)
    engine.start()
    chance = random.Random(0)  # noqa: S311 - for lengths
    found: dict[int, int] = {}
    for index in range(max(rounds) + 1):
        found[index] = psutil.Process().memory_info().rss
        sessions = [SessionId(f"{index} {number}") for number in range(16)]
        for session in sessions:
            prompt = chance.choices(range(5, 3000), k=chance.randrange(1, 600))
            engine.submit(
                ForwardRequest(share=NOBODYS, session=session, base=0, tokens=prompt, num_logits=1)
            )
        for _ in sessions:
            assert handler.ended.acquire(timeout=60)
        for session in sessions:
            engine.release(session)
    engine.stop()
    assert not handler.errors
    return [found[index] for index in rounds]


@pytest.mark.slow
def test_a_process_stops_growing_under_mixed_load() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        start, warm, end = process.submit(serve_mixed_prompts, [0, 20, 80]).result()
    assert warm - start < 250 * MIB
    assert end - warm < 60 * MIB
