"""Faults of the host tier, each caused for real: the iteration fails, its requests are retried, the engine lives on."""

from __future__ import annotations

import time

import pytest

from neoserve.core.request import SamplingParams
from tests.engine.conftest import Tiny
from tests.engine.driving import MODES, check_greedy, engine, finish, generate, request

PROMPTS = [[5, 9, 17, 4], [33, 2, 8, 8, 20, 61], [90] * 30]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def check_all(tiny: Tiny, found: list[list[int]], expected: list[list[int]]) -> None:
    """The answers to all prompts are right."""
    for prompt, tokens, others in zip(PROMPTS, found, expected, strict=True):
        check_greedy(tiny.model, prompt, tokens, others)


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[list[int]]:
    with engine(tiny.path, **MODES["off"]) as core:
        return generate(core, PROMPTS, GREEDY)


@pytest.mark.parametrize("after_tasks", [0, 1, 10, 31])
@pytest.mark.parametrize("kind", ["throw", "die"])
def test_a_failed_lap_is_retried(tiny: Tiny, expected: list[list[int]], kind: str, after_tasks: int) -> None:
    with engine(tiny.path, **MODES["all"]) as core:
        pool = core.worker_pool
        assert pool is not None
        pool.inject_fault(kind, after_tasks=after_tasks)
        check_all(tiny, generate(core, PROMPTS, GREEDY), expected)
        assert core.stats().failed_iterations_total >= 1
        check_all(tiny, generate(core, PROMPTS, GREEDY), expected)


def test_a_stalled_worker_misses_the_deadline(tiny: Tiny, expected: list[list[int]]) -> None:
    with engine(tiny.path, **MODES["all"], host_deadline_s=0.5) as core:
        pool = core.worker_pool
        assert pool is not None
        pool.inject_fault("stall", after_tasks=7)
        start_s = time.monotonic()
        check_all(tiny, generate(core, PROMPTS, GREEDY), expected)
        assert time.monotonic() - start_s < 20, "the stall ends with the deadline, not with a backstop"


def test_a_fault_that_keeps_coming_back_fails_the_requests(tiny: Tiny, expected: list[list[int]]) -> None:
    with engine(tiny.path, **MODES["all"]) as core:
        pool = core.worker_pool
        assert pool is not None
        for index, prompt in enumerate(PROMPTS):
            core.add(request(core, str(index), prompt, GREEDY))
        events: dict[str, str] = {}
        while core.has_work:
            if core.stats().failed_iterations_total < 6:
                pool.inject_fault("throw")
            for event in core.step():
                if event.finish_reason is not None:
                    events[event.request_id] = event.finish_reason
                    assert event.finish_reason != "error" or event.error
        assert sorted(events) == ["0", "1", "2"]
        assert "error" in events.values()
        check_all(tiny, generate(core, PROMPTS, GREEDY), expected)


def test_aborts_at_every_step_leave_nothing_behind(tiny: Tiny) -> None:
    with engine(tiny.path, **MODES["auto-tight"]) as core:
        for num_steps in range(12):
            for index, prompt in enumerate(PROMPTS):
                core.add(request(core, f"{num_steps}-{index}", prompt, GREEDY))
            for _ in range(num_steps):
                core.step()
            for index in range(len(PROMPTS)):
                core.abort(f"{num_steps}-{index}")
            core.abort("never heard of")
            finish(core)
            core.check_integrity()
            assert core.stats().device_blocks_used == core.stats().host_blocks_used == 0
