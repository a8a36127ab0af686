"""The life of requests: admission, tokens, ends, aborts, and what the plans look like."""

from __future__ import annotations

import time

import pytest

from neoserve.core.errors import InvalidRequestError, QueueFullError, RequestTooLongError
from neoserve.core.plan import IterationResult, SampledToken, Tier
from neoserve.scheduling.policy import Policy
from tests.control.environment import LARGE, STOP, Loop, Machine, config, request, scheduler_for, true_output


def loop_for(policy: Policy | None = None, *, ahead: int = 1, **changes: object) -> Loop:
    settings = config(**changes)
    return Loop(scheduler_for(settings, policy), Machine(settings), ahead=ahead)


@pytest.mark.parametrize("mode", ["off", "all", "auto"])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_every_request_gets_its_tokens(mode: str, ahead: int) -> None:
    loop = loop_for(offload=mode, ahead=ahead)
    sent = [request(f"r{n}", prompt, tokens, stops=n % 2 == 0) for n, (prompt, tokens) in enumerate(
        [(1, 1), (16, 20), (17, 3), (200, 30), (300, 100), (5, 60), (64, 64)]
    )]  # fmt: skip
    for each in sent:
        loop.scheduler.add(each)
    loop.drain()
    for each in sent:
        output = true_output(each)
        assert loop.outputs[each.request_id] == output
        assert loop.finished[each.request_id] == ("stop" if output[-1] == STOP and each.stop_ids else "length")
    stats = loop.scheduler.stats()
    assert stats.prompt_tokens_total == sum(len(each.prompt_token_ids) for each in sent)
    assert stats.device_tokens_total + stats.host_tokens_total == sum(len(true_output(s)) - 1 for s in sent)
    assert (stats.host_tokens_total > 0) == (mode == "all") or mode == "auto"
    assert (stats.device_blocks_used, stats.host_blocks_used, stats.num_running) == (0, 0, 0)


def test_no_row_is_planned_past_max_tokens_or_the_context() -> None:
    loop = loop_for(max_model_len=40)
    loop.scheduler.add(request("short", 10, 5))
    loop.scheduler.add(request("clamped", 30, 500))
    loop.drain()
    rows = [row for plan in loop.plans for lap in plan.begins for row in lap.rows]
    assert sum(row.samples for row in rows if row.request_id == "short") == 5
    assert sum(row.samples for row in rows if row.request_id == "clamped") == 10
    assert max(row.length for row in rows) == 39
    assert loop.finished == {"short": "length", "clamped": "length"}


def test_the_row_planned_beyond_a_stop_is_dropped() -> None:
    loop = loop_for()
    sent = next(r for r in (request(f"s{n}", 8, 50, stops=True) for n in range(999)) if len(true_output(r)) == 4)
    loop.scheduler.add(sent)
    loop.drain()
    planned = sum(row.samples for plan in loop.plans for lap in plan.begins for row in lap.rows)
    assert planned == 5
    assert loop.outputs[sent.request_id] == true_output(sent)


def test_a_stop_id_before_min_tokens_does_not_end_a_sequence() -> None:
    loop = loop_for()
    sent = next(r for r in (request(f"s{n}", 8, 9, stops=True) for n in range(999)) if len(true_output(r)) == 4)
    again = request(sent.request_id, 8, 9, stops=True, min_tokens=6)
    loop.scheduler.add(again)
    loop.drain()
    assert len(loop.outputs[sent.request_id]) > 6


def test_prompts_are_cut_to_the_row_budget_and_decodes_come_first() -> None:
    loop = loop_for(offload="off", max_num_batched_tokens=64)
    loop.scheduler.add(request("old", 10, 40))
    loop.step()
    loop.scheduler.add(request("new", 150, 4))
    for _ in range(3):
        loop.step()
    counts = [[row.count for row in lap.prefill] + [1] * len(lap.device_decode) for p in loop.plans for lap in p.begins]
    assert counts == [[10], [63, 1], [63, 1], [24, 1]]
    assert [row.samples for plan in loop.plans for lap in plan.begins for row in lap.prefill] == [
        True,
        False,
        False,
        True,
    ]


def test_requests_that_can_never_fit_are_refused_with_what_to_change() -> None:
    scheduler = scheduler_for(config(max_model_len=4000))
    with pytest.raises(RequestTooLongError, match="context length 4000"):
        scheduler.add(request("a", 4000, 1))
    with pytest.raises(RequestTooLongError, match=r"holds 1280: .*host memory"):
        scheduler.add(request("b", 1000, 300))
    with pytest.raises(RequestTooLongError, match="staging area, which holds 512"):
        scheduler.add(request("c", 700, 10))
    with pytest.raises(RequestTooLongError, match="holds 640"):
        scheduler_for(config(offload="off", max_model_len=4000)).add(request("d", 700, 10))
    assert not scheduler.has_work


def test_the_queue_is_bounded_and_ids_are_unique() -> None:
    scheduler = scheduler_for(config(max_waiting=2, max_num_seqs=1))
    scheduler.add(request("a", 4, 4))
    scheduler.plan_iteration()
    scheduler.add(request("b", 4, 4))
    for taken in ("a", "b"):
        with pytest.raises(InvalidRequestError, match="in use"):
            scheduler.add(request(taken, 4, 4))
    scheduler.add(request("c", 4, 4))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        scheduler.add(request("d", 4, 4))
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


@pytest.mark.parametrize("mode", ["off", "all", "auto"])
@pytest.mark.parametrize("after", range(0, 14))
def test_an_abort_at_any_point_frees_everything(mode: str, after: int) -> None:
    """While it waits, between chunks of its prompt, while it decodes, and with laps in flight."""
    loop = loop_for(offload=mode, max_num_seqs=2, max_num_batched_tokens=32)
    for name, prompt in (("a", 70), ("b", 40), ("c", 20)):
        loop.scheduler.add(request(name, prompt, 6))
    for _ in range(after):
        loop.step()
    for name in ("a", "c"):
        assert loop.scheduler.abort(name) == (name not in loop.finished)
        assert not loop.scheduler.abort(name)
    before = dict(loop.outputs)
    loop.drain()
    assert loop.finished["b"] == "length"
    assert {name: loop.outputs.get(name) for name in ("a", "c")} == {name: before.get(name) for name in ("a", "c")}
    stats = loop.scheduler.stats()
    assert (stats.device_blocks_used, stats.host_blocks_used) == (0, 0)
    assert not loop.scheduler.abort("unknown")


def test_blocks_of_an_aborted_sequence_stay_until_its_lap_is_committed() -> None:
    scheduler = scheduler_for(config(offload="off"))
    scheduler.add(request("a", 60, 6))
    plan = scheduler.plan_iteration()
    assert plan is not None
    scheduler.abort("a")
    assert scheduler.stats().device_blocks_used == 4
    assert scheduler.plan_iteration() is None
    assert scheduler.has_work
    assert scheduler.commit(plan, IterationResult((SampledToken("a", 9),), 1.0)) == []
    assert scheduler.stats().device_blocks_used == 0
    assert not scheduler.has_work


def test_a_prompt_longer_than_the_device_pool_lives_on_the_host_from_the_start() -> None:
    loop = loop_for(device_blocks=8, host_blocks=64)
    loop.scheduler.add(request("long", 400, 5))
    loop.scheduler.add(request("short", 20, 5))
    loop.drain()
    tiers = {row.request_id: row.tier for plan in loop.plans for lap in plan.begins for row in lap.rows}
    assert tiers == {"long": Tier.HOST, "short": Tier.DEVICE}
    assert not any(plan.migrations for plan in loop.plans)


def test_host_only_splits_its_decodes_over_both_sub_batches_when_that_is_faster() -> None:
    settings = config(
        shape=LARGE, offload="all", host_blocks=4000, max_num_seqs=64, max_num_batched_tokens=4096, staging_blocks=256
    )
    loop = Loop(scheduler_for(settings), Machine(settings))
    for n in range(40):
        loop.scheduler.add(request(f"r{n}", 100, 6))
    loop.drain()
    split = [plan for plan in loop.plans if len(plan.begins) == 2 and all(lap.host_decode for lap in plan.begins)]
    assert split
    assert all(span.num_steps == LARGE.num_layers + 1 for plan in loop.plans for span in plan.spans)


def device_only_loop() -> Loop:
    return loop_for(
        shape=LARGE, offload="off", device_blocks=1200, host_blocks=0, max_num_seqs=64, max_num_batched_tokens=2048,
        max_model_len=2048,
    )  # fmt: skip


def test_while_requests_wait_prompts_are_spread_over_all_iterations() -> None:
    """Decode-only laps between large prefills would read the weights for a few rows each."""
    loop = device_only_loop()
    for n in range(80):
        loop.scheduler.add(request(f"r{n}", 1000, 100))
    prompt_rows = []
    while loop.scheduler.num_waiting:
        loop.step()
        prompt_rows.append(sum(rows.count for sub_batch in loop.plans[-1].begins for rows in sub_batch.prefill))
    steady = prompt_rows[len(prompt_rows) // 4 :]
    assert sum(rows > 0 for rows in steady) > 0.7 * len(steady)
    assert max(steady) <= 512


def test_while_none_waits_a_first_token_takes_fewer_iterations() -> None:
    """Many long answers ask for few prompt rows, but whoever comes when memory is free need not wait for that."""
    num_iterations = []
    for num_late in (1, 40):
        loop = device_only_loop()
        for n in range(8):
            loop.scheduler.add(request(f"r{n}", 500, 1000))
        for _ in range(60):
            loop.step()
        for n in range(num_late):
            loop.scheduler.add(request(f"late{n}", 1000, 1000))
        first = len(loop.plans)
        for _ in range(60):
            loop.step()
        rows = [rows for plan in loop.plans[first:] for sub_batch in plan.begins for rows in sub_batch.prefill]
        num_iterations.append(sum(chunk.request_id == "late0" for chunk in rows))
    calm, pressed = num_iterations
    assert 2 * calm <= pressed


def test_laps_that_last_are_advanced_to_their_end() -> None:
    settings = config(
        shape=LARGE, device_blocks=1200, host_blocks=9000, max_num_seqs=128, max_num_batched_tokens=2048,
        staging_blocks=256, max_model_len=2048,
    )  # fmt: skip
    loop = Loop(scheduler_for(settings), Machine(settings))
    for n in range(90):
        loop.scheduler.add(request(f"r{n}", 1000, 100))
    loop.drain()
    partial = [span for plan in loop.plans for span in plan.spans if span.sub_batch == 1 and span.num_steps < 81]
    assert len(partial) > 10
    stats = loop.scheduler.stats()
    assert stats.host_tokens_total > 200
    assert stats.pipelined_iterations_total > 10
    assert loop.outputs["r89"] == true_output(request("r89", 1000, 100))


@pytest.mark.parametrize(("mode", "device_blocks"), [("off", 20_000), ("auto", 2000), ("all", 0)])
def test_planning_and_committing_256_sequences_is_quick(mode: str, device_blocks: int) -> None:
    """Processor time, with room for a slow and busy machine: about 1 ms where this was written."""
    settings = config(
        shape=LARGE, offload=mode, device_blocks=device_blocks, host_blocks=20_000, max_num_seqs=256,
        max_num_batched_tokens=8192, staging_blocks=1024, max_model_len=4096,
    )  # fmt: skip
    scheduler = scheduler_for(settings)
    for n in range(256):
        scheduler.add(request(f"r{n}", 200, 300))
    times = []
    for _ in range(120):
        begin = time.process_time()
        plan = scheduler.plan_iteration()
        planned = time.process_time() - begin
        assert plan is not None
        tokens = tuple(SampledToken(r.request_id, 7 if r.samples else None) for lap in plan.ends for r in lap.rows)
        result = IterationResult(tokens, plan.predicted_us)
        begin = time.process_time()
        scheduler.commit(plan, result)
        times.append(planned + time.process_time() - begin)
    assert sorted(times)[len(times) // 2] < 0.006
