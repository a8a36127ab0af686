"""Sequences change their tier when a pool is too full or has room, and do not bounce."""

from __future__ import annotations

import pytest

from neoserve.core.plan import IterationPlan, Tier
from neoserve.scheduling.policy import Policy
from tests.control.environment import Loop, Machine, config, request, scheduler_for, true_output


def migrations(loop: Loop, source: Tier) -> list[str]:
    return [move.request_id for plan in loop.plans for move in plan.migrations if move.source is source]


def tiers_of(plans: list[IterationPlan], request_id: str) -> set[Tier]:
    return {row.tier for plan in plans for lap in plan.begins for row in lap.rows if row.request_id == request_id}


@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1])
def test_forced_migration_at_every_step_changes_no_token(period: int, ahead: int) -> None:
    """Prompts of several chunks and decodes move at whatever point they have reached."""
    settings = config(max_num_batched_tokens=32)
    loop = Loop(scheduler_for(settings, Policy(forced_migration_period=period)), Machine(settings), ahead=ahead)
    sent = [request(f"r{n}", prompt, 40) for n, prompt in enumerate((1, 15, 16, 100, 150))]
    for each in sent:
        loop.scheduler.add(each)
    loop.drain()
    assert loop.outputs == {each.request_id: true_output(each) for each in sent}
    assert len(migrations(loop, Tier.DEVICE)) > 40 / period
    assert len(migrations(loop, Tier.HOST)) > 40 / period
    starts = {move.num_tokens for plan in loop.plans for move in plan.migrations}
    assert len(starts) > 40 / period


def test_when_the_device_pool_is_too_full_the_newest_leaves() -> None:
    """Lengths that nobody foresaw: three sequences grow until two fill the pool."""
    settings = config(device_blocks=12, host_blocks=40)
    loop = Loop(scheduler_for(settings, Policy(expected_share=0.0)), Machine(settings))
    for name in ("oldest", "middle", "newest"):
        loop.scheduler.add(request(name, 20, 100))
    loop.drain()
    assert migrations(loop, Tier.DEVICE)[0] == "newest"
    assert tiers_of(loop.plans, "oldest") == {Tier.DEVICE}
    assert all(loop.outputs[name] == true_output(request(name, 20, 100)) for name in loop.outputs)


def test_room_that_the_head_of_the_queue_does_not_fit_goes_to_who_is_on_the_host() -> None:
    """Requests that need most of the device pool and short ones take turns; more than one of the former is never there.
    The short ones that went to the host come back beside it, and the head takes their place."""
    settings = config(device_blocks=24, host_blocks=60, max_num_seqs=12)
    loop = Loop(scheduler_for(settings), Machine(settings))
    for n in range(40):
        loop.scheduler.add(request(f"r{n}", 300 if n % 2 else 20, 30))
    came = set()
    while loop.scheduler.num_waiting:
        loop.step()
        if loop.plans[-1].migrations:
            came |= {move.request_id for move in loop.plans[-1].migrations if move.source is Tier.HOST}
    loop.drain()
    assert len(came) > 5


def test_who_stays_on_the_host_though_that_does_not_pay_comes_back_before_others_enter() -> None:
    """Two sequences that nobody foresaw to be so long fill the device pool, and the newer one has to leave it. There it
    gets a token once in a while, and would as long as others wait for the device pool."""
    settings = config(device_blocks=12, host_blocks=40)
    loop = Loop(scheduler_for(settings, Policy(expected_share=0.0), host_gb_s=0.01), Machine(settings))
    for name in ("older", "newer"):
        loop.scheduler.add(request(name, 20, 100))
    for n in range(400):
        loop.scheduler.add(request(f"r{n}", 60, 10))
    while "newer" not in migrations(loop, Tier.HOST):
        loop.step()
    assert "newer" in migrations(loop, Tier.DEVICE)
    assert loop.scheduler.num_waiting > 200
    loop.drain()
    assert all(loop.outputs[name] == true_output(request(name, 20, 100)) for name in ("older", "newer"))


def test_when_the_device_pool_has_room_the_oldest_of_the_host_comes_back() -> None:
    settings = config(device_blocks=12, host_blocks=40)
    loop = Loop(scheduler_for(settings, Policy(expected_share=0.0)), Machine(settings))
    loop.scheduler.add(request("first", 100, 40))
    for name in ("second", "third"):
        loop.scheduler.add(request(name, 20, 140))
    loop.drain()
    went, came = migrations(loop, Tier.DEVICE), migrations(loop, Tier.HOST)
    assert went
    assert came
    assert came[0] == min(set(went), key=["first", "second", "third"].index)


def test_nothing_bounces() -> None:
    """With lengths as foreseen, nobody leaves the device pool at all, and each comes back at most once."""
    settings = config(device_blocks=60, host_blocks=200, max_num_seqs=32)
    loop = Loop(scheduler_for(settings, host_gb_s=1000.0), Machine(settings))
    for n in range(30):
        loop.scheduler.add(request(f"r{n}", 60 + 7 * n % 40, 50 + 11 * n % 60))
    loop.drain()
    back = migrations(loop, Tier.HOST)
    assert migrations(loop, Tier.DEVICE) == []
    assert len(back) == len(set(back))


def test_with_lengths_unforeseen_a_sequence_moves_a_few_times_at_most() -> None:
    settings = config(device_blocks=24, host_blocks=120, max_num_seqs=16)
    loop = Loop(scheduler_for(settings, Policy(expected_share=0.3), host_gb_s=1000.0), Machine(settings))
    for n in range(20):
        loop.scheduler.add(request(f"r{n}", 40, 120))
    loop.drain()
    moves = migrations(loop, Tier.DEVICE) + migrations(loop, Tier.HOST)
    assert max(moves.count(name) for name in set(moves)) <= 6


def test_the_device_pool_fills_first_and_nobody_migrates_while_it_has_room() -> None:
    settings = config()
    loop = Loop(scheduler_for(settings), Machine(settings))
    for n in range(6):
        loop.scheduler.add(request(f"r{n}", 30, 30))
    loop.drain()
    assert {row.tier for plan in loop.plans for lap in plan.begins for row in lap.rows} == {Tier.DEVICE}
    assert not any(plan.migrations for plan in loop.plans)


def test_a_sequence_that_waits_for_a_block_goes_on_when_one_is_free() -> None:
    """Without a host tier nobody can leave: some pause, all end, and none enters before them."""
    settings = config(offload="off", device_blocks=14)
    loop = Loop(scheduler_for(settings, Policy(expected_share=0.0)), Machine(settings))
    for name in ("a", "b", "c", "late"):
        loop.scheduler.add(request(name, 40, 100))
    order: list[str] = []
    paused = 0
    while loop.scheduler.has_work:
        events = loop.step()
        order += [event.request_id for event in events if event.finish_reason]
        if loop.plans[-1].begins:
            paused += len(loop.plans[-1].begins[0].device_decode) < loop.scheduler.num_running
    assert paused > 0
    assert sorted(order) == ["a", "b", "c", "late"]
    assert all(loop.outputs[name] == true_output(request(name, 40, 100)) for name in order)
