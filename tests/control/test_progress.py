"""Nobody starves: the bound that `scheduling/scheduler.py` states, and what failures cost."""

from __future__ import annotations

import pytest

from neoserve.core.plan import IterationPlan, Tier
from neoserve.scheduling.policy import Policy
from tests.control.environment import LARGE, Loop, Machine, config, request, scheduler_for, true_output

BOUND = 2 * Policy().slowest_ratio + Policy().max_skipped + 2


def longest_gap(loop: Loop) -> int:
    """The most iterations between two tokens of one sequence, from its first token on; runs the loop to its end."""
    last: dict[str, int] = {}
    longest = 0
    while loop.scheduler.has_work:
        for event in loop.step():
            if event.token_ids:
                longest = max(longest, loop.num_iterations - last.get(event.request_id, loop.num_iterations))
                last[event.request_id] = loop.num_iterations
    return longest


@pytest.mark.parametrize("host_gb_s", [0.5, 20.0, 500.0])
@pytest.mark.parametrize("num_long", [1, 6])
def test_host_sequences_get_tokens_even_where_they_never_pay(host_gb_s: float, num_long: int) -> None:
    """Contexts that only the host pool can hold, beside device rows that would rather be alone."""
    settings = config(
        shape=LARGE, device_blocks=64, host_blocks=4000, staging_blocks=256, max_model_len=3000, max_num_seqs=32,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    loop = Loop(scheduler_for(settings, host_gb_s=host_gb_s), Machine(settings))
    for n in range(num_long):
        loop.scheduler.add(request(f"long{n}", 2000, 12))
    for n in range(30):
        loop.scheduler.add(request(f"short{n}", 50, 60))
    assert longest_gap(loop) <= BOUND
    assert all(loop.finished[f"long{n}"] == "length" for n in range(num_long))
    assert loop.scheduler.stats().host_tokens_total >= 11 * num_long


@pytest.mark.parametrize("most_forced", [2, 3])
def test_host_sequences_that_never_pay_go_back_before_new_requests_enter(most_forced: int) -> None:
    """Each time that one is moved away, after so many laps that it had to be given, with the queue never empty."""
    settings = config(
        shape=LARGE, device_blocks=300, host_blocks=4000, staging_blocks=256, max_model_len=3000, max_num_seqs=32,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    policy = Policy(forced_migration_period=300, most_forced=most_forced, expected_share=1.0)
    loop = Loop(scheduler_for(settings, policy, host_gb_s=0.5), Machine(settings))
    lengths = {0: 1500, 30: 800}
    for n in range(120):
        loop.scheduler.add(request(f"r{n}", 500, lengths.get(n, 70 + 13 * (n % 4))))
    left: dict[str, int] = {}  # tokens that those in the host pool came with
    gained = {}
    while loop.num_iterations < 890:
        loop.step()
        for move in loop.plans[-1].migrations:
            if move.source is Tier.DEVICE:
                left[move.request_id] = move.num_tokens
            else:
                gained[move.request_id] = move.num_tokens - left.pop(move.request_id)
    assert not left
    assert [*gained] == ["r0", "r30"]
    assert all(most_forced <= tokens <= most_forced + 1 for tokens in gained.values())
    assert loop.scheduler.num_waiting


def test_device_rows_have_a_token_in_every_iteration_beside_host_rows() -> None:
    settings = config(
        shape=LARGE,
        device_blocks=64,
        host_blocks=4000,
        staging_blocks=256,
        max_model_len=3000,
        max_num_batched_tokens=1024,
    )
    loop = Loop(scheduler_for(settings), Machine(settings))
    loop.scheduler.add(request("long", 2000, 30))
    loop.scheduler.add(request("short", 50, 300))
    loop.drain()
    rows = [row for plan in loop.plans for lap in plan.begins for row in lap.device_decode]
    started = next(plan.iteration for plan in loop.plans for lap in plan.begins if lap.device_decode)
    during = [plan for plan in loop.plans if started <= plan.iteration < started + 299]
    assert {row.tier for row in rows} == {Tier.DEVICE}
    assert all(any(row.request_id == "short" for lap in plan.begins for row in lap.device_decode) for plan in during)


def failing_at(*iterations: int, **changes: object) -> tuple[Loop, Machine]:
    settings = config(**changes)

    def fails(plan: IterationPlan) -> bool:
        return plan.iteration in iterations

    machine = Machine(settings, fails)
    return Loop(scheduler_for(settings), machine), machine


@pytest.mark.parametrize("mode", ["off", "all", "auto"])
@pytest.mark.parametrize("iteration", range(0, 10))
def test_one_failure_loses_nothing(mode: str, iteration: int) -> None:
    """In any chunk of the prompt, at the first token, among decodes: the laps run again."""
    loop, _ = failing_at(iteration, offload=mode, max_num_batched_tokens=32)
    sent = [request("a", 70, 12), request("b", 5, 12, repetition_penalty=1.2), request("c", 20, 6)]
    for each in sent:
        loop.scheduler.add(each)
    loop.drain()
    assert loop.outputs == {each.request_id: true_output(each) for each in sent}
    assert loop.scheduler.stats().failed_iterations_total == 1


def test_the_second_failure_is_told_and_the_others_live_on() -> None:
    loop, _ = failing_at(3, 6, offload="all")
    loop.scheduler.add(request("early", 5, 30))
    for _ in range(5):
        loop.step()
    loop.scheduler.add(request("late", 5, 30))
    errors = []
    while loop.scheduler.has_work:
        errors += [event.error for event in loop.step() if event.error]
    assert loop.finished == {"early": "error", "late": "length"}
    assert errors == ["a worker died"]
    assert loop.outputs["late"] == true_output(request("late", 5, 30))


def test_a_sequence_that_no_longer_fits_the_staging_area_cannot_run_again() -> None:
    """On the host, lost rows are fed anew through the staging area, which must hold the whole sequence."""
    loop, _ = failing_at(40, offload="all", staging_blocks=4)
    loop.scheduler.add(request("a", 60, 60))
    loop.drain()
    assert loop.finished == {"a": "error"}
    assert 0 < len(loop.outputs["a"]) < 60


def test_prompt_logprobs_are_not_told_twice() -> None:
    """The first chunk's are out when the last chunk fails with the first token: the prompt cannot begin anew."""
    loop, _ = failing_at(2, max_num_batched_tokens=32)
    loop.scheduler.add(request("a", 70, 5, prompt_logprobs=1))
    loop.drain()
    assert loop.finished == {"a": "error"}


def test_a_lap_that_fails_half_way_is_forgotten() -> None:
    settings = config(
        shape=LARGE,
        device_blocks=64,
        host_blocks=4000,
        staging_blocks=256,
        max_model_len=3000,
        max_num_batched_tokens=1024,
    )
    partial: list[int] = []

    def fails(plan: IterationPlan) -> bool:
        if not partial and any(span.sub_batch == 1 and 0 < span.first_step < 60 for span in plan.spans):
            partial.append(plan.iteration)
            return True
        return False

    loop = Loop(scheduler_for(settings, host_gb_s=5.0), Machine(settings, fails))
    loop.scheduler.add(request("long", 2000, 20))
    for n in range(8):
        loop.scheduler.add(request(f"short{n}", 50, 100))
    loop.drain()
    assert partial
    assert loop.outputs["long"] == true_output(request("long", 2000, 20))
    assert set(loop.finished.values()) == {"length"}
