"""The held-out prompts are what the generator makes, and training never draws one of them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.heldout import held_out_prompts
from tools.embedded_tasks import TASKS, Source
from tools.embedded_tasks import held_out_prompts as generate


def test_file_is_what_the_generator_makes() -> None:
    generated = [(record["task"], tuple(record["messages"]), record["answer"]) for record in generate()]
    assert generated == [(prompt.task, prompt.messages, prompt.answer) for prompt in held_out_prompts()]
    assert Counter(prompt.task for prompt in held_out_prompts()) == dict.fromkeys(TASKS, 100)


def content(task: str, answer: str) -> object:
    """What must not be shared between training and test: unordered summands, sorted numbers, the text itself."""
    if task == "sum":
        return frozenset(answer.split(" = ")[0].split(" + "))
    if task == "sort":
        return tuple(sorted(answer.split(", ")))
    return answer.lower()


@pytest.mark.parametrize("task", TASKS)
def test_training_never_draws_a_held_out_content(task: str) -> None:
    tested = {content(task, prompt.answer) for prompt in held_out_prompts() if prompt.task == task}
    source = Source(Random(0), held_out=False, max_items=15)
    drawn = {content(task, TASKS[task](source).answer) for _ in range(5000)}
    assert not tested & drawn
