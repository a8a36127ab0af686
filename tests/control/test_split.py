"""Which program an iteration runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neoserve.core.plan import Tier
from neoserve.core.program import Span
from neoserve.scheduling.candidates import Choice, Chunk, Pace, Work, deal
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.load import Load
from neoserve.scheduling.policy import Policy
from neoserve.scheduling.split import Splitter
from neoserve.scheduling.table import CostTable, Curve
from tests.control.environment import H200_LINEAR_US, LARGE

NUM_STEPS = LARGE.num_layers + 1
DEVICE = Load.device_decode(18, 18 * 1024)


def splitter(*, target_us: float | None = None, target_ttft_us: float | None = None, **rates: float) -> Splitter:
    cost = CostModel(CostTable.rough(LARGE, **rates), LARGE)  # type: ignore[arg-type]
    return Splitter(cost, LARGE.num_layers, Policy(), target_us, target_ttft_us)


def work(
    device: Load = DEVICE,
    chunks: tuple[Chunk, ...] = (),
    host: tuple[int, ...] = (),
    lap: Load | None = None,
    lap_step: int = 0,
    must_run_host: bool = False,
    pace: float = 10.0,
    fills_host: bool = False,
    is_calm: bool = False,
) -> Work:
    return Work(DEVICE, device, chunks, Pace(pace, fills_host, is_calm), host, lap, lap_step, must_run_host)


def is_device_only(choice: Choice) -> bool:
    return choice.num_host == (0, 0) and choice.lap_steps == 0


def prompt(count: int, tier: Tier = Tier.DEVICE) -> Chunk:
    return Chunk(tier, 0, count, samples=True)


def test_prompts_that_nobody_waits_for_are_computed_at_once() -> None:
    choice = splitter().choose(work(device=Load(), chunks=(prompt(1000), prompt(1048))))
    assert is_device_only(choice)
    assert choice.prefill_rows == (2048, 0)


@pytest.mark.parametrize("pace", [20.0, 40.0])
def test_beside_decodes_prompts_keep_pace_with_the_tokens_that_are_generated(pace: float) -> None:
    choice = splitter().choose(work(chunks=(prompt(1000), prompt(1048)), pace=pace))
    assert is_device_only(choice)
    assert choice.prefill_rows == (18 * pace, 0)


@pytest.mark.parametrize("num_host", [0, 12, 57])
@pytest.mark.parametrize("pace", [5.0, 10.0, 15.0])
def test_prompts_fill_what_is_recorded(num_host: int, pace: float) -> None:
    """Also where they are divided, and each sub-batch has other rows beside them."""
    recorded = (16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 768)
    table = replace(CostTable.rough(LARGE), linear=Curve(H200_LINEAR_US), recorded_rows=recorded)
    splits = Splitter(CostModel(table, LARGE), LARGE.num_layers, Policy())
    choice = splits.choose(work(host=(1030,) * num_host, chunks=(prompt(1000), prompt(1000)), pace=pace))
    decodes = (DEVICE.rows + choice.num_host[0], choice.num_host[1])
    for decode_rows, prompt_rows in zip(decodes, choice.prefill_rows, strict=True):
        assert prompt_rows == 0 or decode_rows + prompt_rows in recorded
    assert sum(choice.prefill_rows) > 0


@pytest.mark.parametrize("num_host", [42, 50, 60])
def test_prompts_keep_pace_where_host_rows_would_do_better_in_every_iteration(num_host: int) -> None:
    """With few prompt rows a lap of the host rows pays best when it takes several iterations, and with few host rows
    in each of them few prompt rows keep pace; many of both generate more."""
    choice = splitter().choose(work(host=(1045,) * num_host, chunks=(prompt(1000, Tier.HOST), prompt(1048))))
    assert choice.lap_steps == NUM_STEPS
    assert sum(choice.prefill_rows) == 10 * (DEVICE.rows + num_host)


@pytest.mark.parametrize("pace", [27.0, 28.0, 30.0])
def test_while_the_host_tier_fills_prompts_come_rather_faster_than_at_their_pace(pace: float) -> None:
    """Host rows pay beside too few prompt rows for the tokens, and not beside more; with those that pay at the moment,
    as many sequences would end as come."""
    cost = CostModel(replace(CostTable.rough(LARGE, launch_us=24.0), linear=Curve(H200_LINEAR_US)), LARGE)
    host, chunks = (1030,) * 5, (prompt(1000, Tier.HOST), prompt(1048))
    fills, pays = (
        Splitter(cost, LARGE.num_layers, Policy()).choose(
            work(host=host, chunks=chunks, pace=pace, fills_host=fills_host)
        )
        for fills_host in (True, False)
    )
    assert sum(fills.prefill_rows) >= pace * fills.decode_rows
    assert sum(fills.num_host) == len(host)
    assert sum(pays.prefill_rows) < pace * pays.decode_rows


@pytest.mark.parametrize(("num_host", "pace"), [(10, 36.0), (12, 30.0), (12, 36.0)])
def test_prompts_are_divided_unevenly_where_that_is_faster(num_host: int, pace: float) -> None:
    """A few host rows hide behind a quarter of the prompts as well as behind half of them, and the larger part
    multiplies matrices better for it."""
    cost = CostModel(replace(CostTable.rough(LARGE), linear=Curve(H200_LINEAR_US)), LARGE)
    asked = work(host=(1030,) * num_host, chunks=(prompt(1000, Tier.HOST), prompt(1048)), pace=pace)
    first, second = Splitter(cost, LARGE.num_layers, Policy()).choose(asked).prefill_rows
    assert 0 < 2 * second < first


def test_where_few_prompts_would_do_the_device_is_used_up_to_its_ridge_point() -> None:
    """As many rows as cost little beside the read of the weights: a row costs less than among many."""
    alone = splitter().choose(work())
    choice = splitter().choose(work(chunks=(prompt(2000),), pace=1.0))
    many = splitter().choose(work(chunks=(prompt(2000),), pace=1000.0))
    assert 64 <= choice.prefill_rows[0] <= 256

    def row_us(choice: Choice) -> float:
        return (choice.price.total_us - alone.price.total_us) / sum(choice.prefill_rows)

    assert row_us(choice) < 0.7 * row_us(many)


@pytest.mark.parametrize("num_host", [0, 40])
def test_while_no_request_waits_prompts_come_twice_as_fast_as_at_the_ridge_point(num_host: int) -> None:
    host = (1024,) * num_host
    pressed, calm = (
        splitter().choose(work(chunks=(prompt(2000),), host=host, pace=1.0, is_calm=is_calm))
        for is_calm in (False, True)
    )
    assert sum(calm.prefill_rows) == 2 * sum(pressed.prefill_rows)
    fast = splitter().choose(work(chunks=(prompt(2000),), host=host, pace=1000.0, is_calm=True))
    assert sum(fast.prefill_rows) == 2000


def test_a_few_host_rows_do_not_pay_and_many_do() -> None:
    assert is_device_only(splitter().choose(work(host=(1024,) * 4)))
    choice = splitter().choose(work(host=(1024,) * 60))
    assert choice.num_host == (0, 60)
    assert 81 / 6 <= choice.lap_steps <= 81 / 3  # a lap in 3 to 6 iterations: where the worker pool is just hidden


def test_a_lap_in_flight_goes_fast_while_prompts_make_the_iteration_long() -> None:
    lap = Load.host_decode(60, 60 * 1024)
    slow = splitter().choose(work(lap=lap, lap_step=20))
    fast = splitter().choose(work(lap=lap, lap_step=20, chunks=(prompt(1024),)))
    assert 0 < slow.lap_steps < fast.lap_steps <= NUM_STEPS - 20


@pytest.mark.parametrize("lap_step", range(0, NUM_STEPS, 6))
def test_a_lap_in_flight_keeps_its_pace_to_the_end(lap_step: int) -> None:
    """Where the worker pool is just hidden, however little of the lap is left."""
    choice = splitter().choose(work(lap=Load.host_decode(57, 57 * 1043), lap_step=lap_step))
    left = NUM_STEPS - lap_step
    assert choice.lap_steps >= min(left, NUM_STEPS / 8)


def test_prompts_are_shared_out_when_both_sub_batches_have_host_rows_to_hide() -> None:
    choice = splitter().choose(work(chunks=(prompt(1000), prompt(1000)), host=(1024,) * 80, pace=40.0))
    assert choice.lap_steps == NUM_STEPS
    assert min(choice.prefill_rows) > 0


@pytest.mark.parametrize("pace", [5.0, 10.0, 20.0])
def test_host_rows_count_for_the_pace_as_far_as_their_lap_gets(pace: float) -> None:
    choice = splitter().choose(work(chunks=(prompt(8000),), host=(1024,) * 60, pace=pace))
    assert any(choice.num_host)
    decodes = 18 + 60 * min(1.0, choice.lap_steps / NUM_STEPS)
    assert choice.decode_rows == pytest.approx(decodes)
    assert 0.75 * pace * decodes <= sum(choice.prefill_rows) <= max(256, 1.15 * pace * decodes)


@pytest.mark.parametrize("target_ms", [100, 2500, 3500, None])
def test_a_target_for_prompts_bounds_how_far_they_are_spread(target_ms: float | None) -> None:
    cuts = splitter(target_ttft_us=None if target_ms is None else target_ms * 1e3)
    choice = cuts.choose(work(chunks=(prompt(8000),), host=(1024,) * 60, pace=20.0))
    rows = sum(choice.prefill_rows)
    if target_ms is None:
        assert rows < 4000
    elif target_ms == 100:
        assert rows == 8000  # not even all at once takes so little
    else:
        assert 8000 / rows * choice.price.total_us <= target_ms * 1e3


def test_one_prompt_is_divided_so_that_host_rows_need_no_read_of_the_weights_of_their_own() -> None:
    whole = splitter().choose(work(chunks=(prompt(1000),), pace=60.0))
    choice = splitter().choose(work(chunks=(prompt(1000),), host=(1024,) * 60, pace=60.0))
    assert min(choice.prefill_rows) > 0
    assert choice.price.total_us < 1.1 * whole.price.total_us


def test_the_split_hides_host_attention() -> None:
    """Without device rows both halves carry host rows, and the device hardly waits while the pool is fast enough."""
    choice = splitter(host_gb_s=400.0).choose(work(device=Load(), host=(1024,) * 64))
    assert 24 <= choice.num_host[1] <= 40
    assert sum(choice.num_host) == 64
    assert choice.price.total_us < 1.05 * choice.price.device_us


def test_host_rows_alone_are_not_split_when_reading_the_weights_twice_costs_more() -> None:
    choice = splitter().choose(work(device=Load(), host=(64,) * 2))
    assert choice.num_host == (2, 0)


def test_one_host_row_that_must_run_costs_device_rows_little() -> None:
    """A context of 100k tokens beside 16 short ones: its lap takes many iterations."""
    alone = splitter().choose(work())
    choice = splitter().choose(work(host=(100_000,), must_run_host=True))
    assert choice.lap_steps or choice.num_host[0]
    assert choice.price.total_us < 1.1 * alone.price.total_us


@settings(deadline=None)
@given(
    device=st.integers(0, 40),
    host=st.lists(st.integers(1, 5000), max_size=120),
    prompts=st.lists(st.integers(1, 3000), max_size=4),
    host_gb_s=st.sampled_from([5.0, 50.0, 500.0]),
)
def test_never_worse_than_device_only(device: int, host: list[int], prompts: list[int], host_gb_s: float) -> None:
    """Whatever is chosen has a better rate than the same prompts and device rows without host rows."""
    chosen = splitter(host_gb_s=host_gb_s)
    load = Load.device_decode(device, device * 800)
    chunks = tuple(prompt(count) for count in prompts)
    if not (load.rows or host or chunks):
        return
    choice = chosen.choose(work(device=load, chunks=chunks, host=tuple(host)))
    assert sum(choice.num_host) in (0, len(host))
    if load.rows and any(choice.num_host):
        same = (prompt(sum(choice.prefill_rows)),) if any(choice.prefill_rows) else ()
        device_only = chosen.choose(work(device=load, chunks=same, pace=1e9))
        assert choice.rate > device_only.rate
    if not load.rows and host:
        assert sum(choice.num_host) == len(host)


@settings(deadline=None)
@given(
    step=st.integers(1, 80),
    rows=st.integers(1, 120),
    device=st.sampled_from([Load(), DEVICE]),
    prompts=st.sampled_from([(), (prompt(500),)]),
)
def test_a_lap_in_flight_always_gets_on(step: int, rows: int, device: Load, prompts: tuple[Chunk, ...]) -> None:
    lap = Load.host_decode(rows, rows * 1000)
    choice = splitter().choose(work(device=device, chunks=prompts, lap=lap, lap_step=step))
    assert min(NUM_STEPS - step, NUM_STEPS // 16) <= choice.lap_steps <= NUM_STEPS - step
    assert choice.lap_steps == NUM_STEPS - step or device.rows or prompts


@pytest.mark.parametrize("target_ms", [60, 120, 250])
def test_targets_bound_both_intervals(target_ms: float) -> None:
    choice = splitter(target_us=target_ms * 1e3).choose(work(host=(1024,) * 30))
    iterations = NUM_STEPS / choice.lap_steps if choice.lap_steps else 1
    assert choice.price.total_us * iterations <= target_ms * 1e3


def test_a_target_cuts_prompts_down_to_what_fits_beside_the_device_rows() -> None:
    choice = splitter(target_us=120_000.0).choose(work(chunks=(prompt(8000),)))
    assert 0 < sum(choice.prefill_rows) < 1000
    assert choice.price.total_us <= 120_000


def rows_worth_having(rows: int, balance: float = 0.0, wanted: int = 0, **rates: float) -> int:
    host = Load.host_decode(rows, rows * 1024)
    return splitter(**rates).rows_worth_having(DEVICE, DEVICE, host, balance, most_rows=2048, wanted=wanted)


def test_whether_host_rows_pay_depends_on_how_many_there_will_be_and_on_the_host() -> None:
    assert not rows_worth_having(2)
    assert rows_worth_having(60)
    assert not rows_worth_having(60, host_gb_s=5.0)
    assert rows_worth_having(60, balance=10.0)
    assert not rows_worth_having(60, balance=80.0)  # the time goes to prompts, whoever decodes beside them


def test_as_many_host_rows_stay_wanted_unless_another_number_is_clearly_better() -> None:
    assert rows_worth_having(140, balance=1.0, wanted=138) == 138
    assert rows_worth_having(140, balance=1.0, wanted=20) == 140
    assert rows_worth_having(140, balance=1.0, wanted=150) == 140  # more than there are to be had


def test_no_more_host_rows_are_worth_having_than_generate_more_tokens() -> None:
    """Where prompts fill the device's time, iterations with more host rows are longer and do hardly more in it."""
    assert rows_worth_having(140, balance=1.0) == 140
    assert 0 < rows_worth_having(140, balance=10.0) < 100


@pytest.mark.parametrize("balance", [1.0, 5.0])
def test_a_looser_target_does_not_end_what_pays_under_a_tighter_one(balance: float) -> None:
    """More host rows may meet it beside prompts and miss it without them; fewer meet it both times."""
    host = Load.host_decode(64, 64 * 1024)
    wanted = [
        splitter(target_us=1e3 * target_ms).rows_worth_having(DEVICE, DEVICE, host, balance, most_rows=2048)
        for target_ms in (100, 120, 150, 200, 250, 300, 400, 600)
    ]
    assert all(wanted)
    assert wanted == sorted(wanted)


def test_where_prompts_come_in_few_iterations_host_rows_count_in_those_between() -> None:
    """At the ridge point or beyond there are enough for several; as many again in each would slow host rows down."""
    assert rows_worth_having(60, balance=4.0) == 60


def test_rows_of_short_prompts_are_not_priced_as_those_of_a_long_one() -> None:
    """They attend to less."""
    host = Load.host_decode(60, 60 * 128)
    slow_pairs = replace(CostTable.rough(LARGE), prefill_us_per_pair=0.1)
    chosen = Splitter(CostModel(slow_pairs, LARGE), LARGE.num_layers, Policy())
    assert chosen.rows_worth_having(DEVICE, DEVICE, host, balance=2.0, most_rows=2048) == 60


def test_a_prompt_that_takes_several_iterations_brings_back_what_was_computed_of_it() -> None:
    """Which a prompt that the device keeps does not."""
    host = Load.host_decode(60, 60 * 1024)
    table = CostTable.rough(LARGE)
    slow_link = replace(table, migration_us_per_token=80 * table.migration_us_per_token)
    for costs, pays in ((table, True), (slow_link, False)):
        chosen = Splitter(CostModel(costs, LARGE), LARGE.num_layers, Policy())
        assert bool(chosen.rows_worth_having(DEVICE, DEVICE, host, balance=10.0, most_rows=2048)) == pays


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(0, 100), st.integers(0, 100))
def test_dealing_keeps_to_the_limits_and_to_the_order(counts: list[int], first: int, second: int) -> None:
    parts = list(deal([prompt(count) for count in counts], (first, second)))
    rows = [(part.index, part.offset + row, part.sub_batch) for part in parts for row in range(part.count)]
    in_order = [(index, row) for index, count in enumerate(counts) for row in range(count)]
    assert [row[:2] for row in rows] == in_order[: first + second]
    assert [sub_batch for *_, sub_batch in rows] == [int(place >= first) for place in range(len(rows))]
    for part in parts:
        assert part.ends == (part.offset + part.count == counts[part.index])
        assert part.continues == ((part.index, part.offset - 1, 0) in rows and part.sub_batch == 1)


def test_prices_do_not_depend_on_what_was_priced_before() -> None:
    cost = CostModel(CostTable.rough(LARGE), LARGE)
    spans = [Span(0, 0, NUM_STEPS, False)]
    before = cost.price(spans, {0: DEVICE})
    cost.price(spans, {0: DEVICE + DEVICE})
    assert cost.price(spans, {0: DEVICE}) == before
