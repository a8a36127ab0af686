"""The embedded checkpoint as an oracle: right answers to prompts that it never saw, wherever the KV lives."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from neoserve.core.request import SamplingParams
from neoserve.models.checkpoint import resolve
from tests.engine.driving import MODES, engine, generate
from tests.heldout import held_out_prompts

PROMPTS = held_out_prompts()
GREEDY = SamplingParams(temperature=0, max_tokens=80)


def answers(mode: str, dtype: str) -> list[str]:
    """The greedy answers to all held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(None))
    prompts = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True).input_ids
        for prompt in PROMPTS
    ]
    with engine(None, **MODES[mode], dtype=dtype) as core:
        found = generate(core, prompts, GREEDY)
        if mode == "auto-tight":
            stats = core.stats()
            assert stats.device_tokens_total > 0
            assert stats.host_tokens_total > 0
            assert stats.pipelined_iterations_total > 0
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def score(found: list[str]) -> int:
    """How many answers are exactly right."""
    return sum(answer == prompt.answer for answer, prompt in zip(found, PROMPTS, strict=True))


@pytest.fixture(scope="module")
def device_only() -> list[str]:
    return answers("off", "float32")


def test_the_answers_are_right(device_only: list[str]) -> None:
    assert len(PROMPTS) == 500
    assert score(device_only) >= 475


@pytest.mark.parametrize("mode", ["all", "auto-tight"])
def test_the_answers_do_not_depend_on_the_tiers(device_only: list[str], mode: str) -> None:
    assert answers(mode, "float32") == device_only


@pytest.mark.parametrize("mode", ["off", "all", "auto-tight"])
def test_bfloat16_scores_the_same(device_only: list[str], mode: str) -> None:
    assert abs(score(answers(mode, "bfloat16")) - score(device_only)) <= 2
