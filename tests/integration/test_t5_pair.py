"""The encoder-decoder pair that ships, in this process: it says what transformers says."""

from __future__ import annotations

from cascade.demo import T5_DRAFTER, T5_EXPERT
from cascade.evaluation.client import start_in_process
from cascade.evaluation.tasks import TaskFamily, held_out
from cascade.settings import Application
from cascade.training.examine import greedy_answers, load

TIER = {"model": "demo-t5", "engine": {"threads": 1}}
SETTINGS = Application.model_validate({"drafter": TIER, "expert": TIER})


async def test_lossless_greedy_answers_are_those_of_the_expert() -> None:
    pair = load(drafter=T5_DRAFTER, expert=T5_EXPERT)
    prompts = [item.prompt for item in held_out(TaskFamily.TRANSLATION, count=12)]
    answers = greedy_answers(pair.expert, pair.tokenizer, prompts)
    async with start_in_process(SETTINGS) as client:
        for prompt, answer in zip(prompts, answers, strict=True):
            result = await client.complete(
                {
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": 96,
                    "temperature": 0,
                    "cascade": {"mode": "speculative", "draft_tokens": 5},
                }
            )
            assert result.text == pair.tokenizer.decode(answer)
            assert result.statistics["drafted"] > 0
