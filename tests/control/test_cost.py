"""Prices: small programs by hand, long ones against the whole walk, and learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoserve.core.config import ModelShape
from neoserve.core.plan import Tier
from neoserve.core.program import Op, Span
from neoserve.scheduling import timeline
from neoserve.scheduling.cost import CostModel, Kind, Price
from neoserve.scheduling.load import Load
from neoserve.scheduling.table import CostTable, Curve
from neoserve.scheduling.timeline import OPS
from tests.control.environment import H200_LINEAR_US, LARGE

SHAPE = ModelShape(3, 1, 1, 1, 2, 1, 10, 100, False)
"""Three layers; of the 14 linear parameters 6 come before the attention."""


def table(**changes: object) -> CostTable:
    base = CostTable(
        linear=Curve(((0, 14.0), (100, 14.0))),
        head=Curve(((0, 7.0),)),
        embed=Curve(((0, 5.0),)),
        device_decode_us=1.0,
        device_us_per_token=0.5,
        prefill_us=2.0,
        prefill_us_per_pair=0.25,
        host_task_us=10.0,
        host_us_per_token=2.0,
        host_us_per_row=1.0,
        handoff_us=0.0,
        handoff_us_per_row=0.0,
        prefill_launch_us=0.0,
        staged_launch_us=0.0,
        host_launch_us=0.0,
        decode_launch_us=0.0,
        graph_launch_us=0.0,
        migration_us_per_token=0.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def whole(sub_batch: int = 0, *, host: bool = False) -> Span:
    return Span(sub_batch, 0, SHAPE.num_layers + 1, host)


def total(costs: CostTable, spans: list[Span], loads: dict[int, Load]) -> float:
    return CostModel(costs, SHAPE).price(spans, loads).total_us


def test_device_decode_by_hand() -> None:
    load = Load.device_decode(2, 10)
    assert total(table(), [whole()], {0: load}) == 5 + 3 * (14 + 1 + 10 * 0.5) + 7


def test_prefill_by_hand() -> None:
    """Four rows after eight tokens see 9 + 10 + 11 + 12 tokens; a chunk that yields no token needs no head, nor what
    comes before it in the last layer after the attention."""
    load = Load.prefill(Tier.DEVICE, start=8, count=4, samples=True)
    assert total(table(), [whole()], {0: load}) == 5 + 3 * (14 + 2 + 42 * 0.25) + 7
    chunk = Load.prefill(Tier.DEVICE, start=8, count=4, samples=False)
    assert total(table(), [whole()], {0: chunk}) == 5 + 3 * (14 + 2 + 42 * 0.25) - 8


def test_the_last_layer_ends_with_the_rows_that_yield_a_token() -> None:
    """100 rows take 28 us a layer, the one that samples 14."""
    costs = table(linear=Curve(((1, 14.0), (100, 28.0))))
    load = Load.prefill(Tier.DEVICE, start=0, count=100, samples=True)
    assert total(costs, [whole()], {0: load}) == 5 + 3 * (28 + 2 + 5050 * 0.25) - (16 - 8) + 7


def test_copies_of_a_host_prompt_hide_behind_the_layer_as_far_as_they_can() -> None:
    """This chunk goes out and the earlier ones come in, beside 14 us of linear layers and 12.5 of attention."""
    loads = {tier: Load.prefill(tier, start=8, count=4, samples=True) for tier in Tier}
    for us_per_token, shows_us in ((3 * 26.5 / 12, 0.0), (3 * 28.5 / 12, 3 * 2.0)):
        costs = table(migration_us_per_token=us_per_token)
        on_host, on_device = (total(costs, [whole()], {0: loads[tier]}) for tier in (Tier.HOST, Tier.DEVICE))
        assert on_host == pytest.approx(on_device + shows_us)


def test_alone_host_rows_wait_for_their_attention_in_every_layer() -> None:
    load = Load.host_decode(2, 5)
    assert total(table(), [whole(host=True)], {0: load}) == 5 + 3 * (14 + 10 + 5 * 2 + 2) + 7
    slow_link = table(handoff_us=4.0, handoff_us_per_row=0.5)
    assert total(slow_link, [whole(host=True)], {0: load}) == 5 + 3 * (14 + 22 + 5) + 7


def test_lock_step_hides_host_attention_behind_the_other_sub_batch() -> None:
    """A step of 14 us hides a task of 12 us; what is left is the device's own work."""
    load = Load.host_decode(1, 1)
    spans = [whole(0, host=True), whole(1, host=True)]
    one_lap = 5 + 3 * 14 + 7
    hidden = table(host_task_us=9.0)
    price = CostModel(hidden, SHAPE).price(spans, {0: load, 1: load})
    assert price.device_us == 2 * one_lap
    assert price.host_us == 6 * 12
    first_layer_shows = 12 - (5 + 6)  # where only EMBED and PRE of sub-batch 1 stand before RECV
    assert price.total_us == pytest.approx(2 * one_lap + first_layer_shows)
    assert total(table(host_task_us=50.0), spans, {0: load, 1: load}) >= 6 * 53


def test_enqueueing_is_a_floor_and_graphs_lower_it() -> None:
    costs = table(
        prefill_launch_us=300.0, staged_launch_us=100.0, host_launch_us=500.0, decode_launch_us=60.0,
        graph_launch_us=150.0,
    )  # fmt: skip
    decode, prompt = Load.device_decode(1, 1), Load.prefill(Tier.DEVICE, 0, 4, samples=True)
    staged = Load.prefill(Tier.HOST, 0, 4, samples=True)
    assert total(costs, [whole()], {0: decode}) == 150.0
    assert total(costs, [Span(0, 0, 3, False)], {0: decode}) == 3 * 60.0
    assert total(costs, [whole()], {0: prompt + decode}) == 4 * 300.0
    assert total(costs, [whole()], {0: prompt + staged}) == 4 * 400.0
    both = {0: decode, 1: Load.host_decode(1, 1) + staged}
    assert total(costs, [whole(), whole(1, host=True)], both) == 4 * (60.0 + 500.0 + 400.0)


loads = st.builds(
    lambda device, tokens, host, host_tokens, prefill: (
        Load.device_decode(device, device * tokens)
        + Load.host_decode(host, host * host_tokens)
        + Load.prefill(Tier.DEVICE, 0, prefill, samples=True)
    ),
    st.integers(1, 64), st.integers(1, 2000), st.integers(0, 100), st.integers(1, 2000), st.integers(0, 2000),
)  # fmt: skip


@given(load=loads, more=loads)
def test_more_work_never_costs_less(load: Load, more: Load) -> None:
    model = CostModel(CostTable.rough(LARGE), LARGE)
    span = Span(0, 0, LARGE.num_layers + 1, True)
    assert model.price([span], {0: load + more}).total_us >= model.price([span], {0: load}).total_us - 1e-6


@given(first=loads, rows=st.integers(1, 120), ratio=st.integers(1, 8), lock_step=st.booleans())
def test_few_layers_tell_of_all(first: Load, rows: int, ratio: int, lock_step: bool) -> None:
    """Extrapolating from a few layers is within 1 % of walking all 80."""
    model = CostModel(CostTable.rough(LARGE), LARGE)
    num_steps = LARGE.num_layers + 1
    host = Load.host_decode(rows, rows * 1000)
    spans = (Span(0, 0, num_steps, lock_step), Span(1, 0, num_steps if lock_step else -(-num_steps // ratio), True))
    costs = [model.stage_costs(first), model.stage_costs(host)]
    exact = timeline.walk_whole(timeline.itinerary(LARGE.num_layers, spans), *costs)
    assert timeline.walk_us(LARGE.num_layers, spans, *costs) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("first_step", "stop_step"), [(0, 20), (20, 41), (61, 81), (80, 81)])
def test_parts_of_a_lap_are_priced_like_the_whole_walk(first_step: int, stop_step: int) -> None:
    model = CostModel(CostTable.rough(LARGE), LARGE)
    loads = (Load.device_decode(18, 18_000), Load.host_decode(56, 56_000))
    spans = (Span(0, 0, 81, False), Span(1, first_step, stop_step, True))
    costs = [model.stage_costs(load) for load in loads]
    exact = timeline.walk_whole(timeline.itinerary(80, spans), *costs)
    assert timeline.walk_us(80, spans, *costs) == pytest.approx(exact, rel=0.001)


def test_curves_are_linear_between_points_and_go_on_after_the_last() -> None:
    curve = Curve(((1, 10.0), (11, 20.0), (21, 60.0)))
    assert [curve.at(x) for x in (0, 1, 6, 11, 16, 31)] == [10, 10, 15, 20, 40, 100]
    assert Curve(((4, 3.0),)).at(100) == 3.0


def test_a_table_survives_the_disk() -> None:
    rough = replace(CostTable.rough(LARGE), recorded_rows=(64, 128))
    assert CostTable.from_json(rough.to_json()) == rough
    with pytest.raises(ValueError, match="fields"):
        CostTable.from_json("{}")


def test_laps_with_prompts_or_host_rows_take_as_long_as_the_recording_that_holds_them() -> None:
    costs = table(linear=Curve(((0, 0.0), (100, 100.0))), recorded_rows=(16, 32))
    model = CostModel(costs, SHAPE)

    def linear_us(load: Load) -> float:
        device_us = model.stage_costs(load).device_us
        return device_us[OPS.index(Op.PRE)] + device_us[OPS.index(Op.POST)]

    assert [linear_us(Load.prefill(Tier.DEVICE, 0, rows, samples=True)) for rows in (3, 16, 17, 33)] == [16, 16, 32, 33]
    assert linear_us(Load.device_decode(3, 30) + Load.host_decode(14, 140)) == 32
    assert linear_us(Load.device_decode(3, 30)) == 3


RECORDED = (16, 32, 64, 96, 128, 192, 256)


@pytest.mark.parametrize(
    ("wanted", "decode_rows", "expected"),
    [
        (111, 17, 111),
        (130, 17, 111),  # up to a quarter fewer
        (150, 17, 175),
        (256, 17, 239),
        (272, 17, 272),  # nothing is recorded for so many
        (20, 30, 34),  # half as many would not do
        (0, 17, 0),
    ],
)
def test_prompts_fill_the_recording_that_is_nearest(wanted: int, decode_rows: int, expected: int) -> None:
    assert CostModel(table(recorded_rows=RECORDED), SHAPE).filling(wanted, decode_rows) == expected


@given(wanted=st.integers(1, 400), decode_rows=st.integers(0, 300), sizes=st.sets(st.integers(1, 512)))
def test_what_fills_a_recording_is_not_far_fewer_prompt_rows(wanted: int, decode_rows: int, sizes: set[int]) -> None:
    filling = CostModel(table(recorded_rows=tuple(sorted(sizes))), SHAPE).filling(wanted, decode_rows)
    assert filling >= 0.75 * wanted
    assert filling == wanted or filling + decode_rows in sizes


UNEVEN = Curve(((1, 100.0), (64, 110.0), (128, 200.0), (256, 400.0), (320, 590.0), (384, 592.0), (448, 720.0)))
"""Linear layers that arithmetic bounds from 128 rows on, with 320 rows for almost the price of 384."""


@pytest.mark.parametrize(
    ("wanted", "decode_rows", "expected"),
    [
        (340, 20, 364),  # 384 rows take less time each
        (310, 0, 310),  # they are too far
        (400, 20, 364),  # also fewer may
        (90, 10, 90),  # reads bound both 100 and 128
        (20, 300, 20),  # one of few prompt rows must be near them
    ],
)
def test_beyond_what_is_recorded_prompts_make_up_the_number_of_rows_that_takes_the_least_time_each(
    wanted: int, decode_rows: int, expected: int
) -> None:
    for recorded in ((), (16, 64)):
        assert CostModel(table(linear=UNEVEN, recorded_rows=recorded), SHAPE).filling(wanted, decode_rows) == expected


def test_a_prefill_row_is_worth_what_it_costs_among_many() -> None:
    """By the last half of what was measured, so that one odd number of rows says little."""
    costs = table(linear=Curve(((1, 100.0), (1024, 1000.0), (1920, 2100.0), (2048, 2024.0))))
    assert CostModel(costs, SHAPE).prefill_row_us() == pytest.approx(SHAPE.num_layers)


def test_a_model_that_is_wrong_by_a_factor_learns_it_for_that_kind_alone() -> None:
    model = CostModel(table(), SHAPE)
    decode, prefill = Load.device_decode(2, 10), Load.prefill(Tier.DEVICE, 0, 4, samples=True)
    before = model.price([whole()], {0: prefill}).total_us
    for _ in range(300):
        price = model.price([whole()], {0: decode})
        model.observe(price, 1.8 * price.table_us)
    assert price.kind is Kind.DEVICE_DECODE
    assert model.price([whole()], {0: decode}).total_us == pytest.approx(1.8 * price.table_us, rel=0.02)
    assert model.price([whole()], {0: prefill}).total_us == pytest.approx(before, rel=0.02)
    assert model.error < 0.05


def test_a_machine_that_is_slow_for_a_while_is_not_learned_as_what_ran_then() -> None:
    """Else that would seem too dear afterwards, and what does not run is not corrected."""
    model = CostModel(table(), SHAPE)
    decode, prefill = Load.device_decode(2, 10), Load.prefill(Tier.DEVICE, 0, 4, samples=True)
    prices = [model.price([whole()], {0: load}) for load in (decode, prefill)]
    for _ in range(15):
        model.observe(prices[0], 1.7 * prices[0].table_us)
    slow = [model.price([whole()], {0: load}).total_us for load in (decode, prefill)]
    assert slow[0] > 1.4 * prices[0].table_us
    assert slow[0] / slow[1] == pytest.approx(prices[0].table_us / prices[1].table_us, rel=0.3)
    for _ in range(15):
        model.observe(prices[1], prices[1].table_us)
    assert model.price([whole()], {0: decode}).total_us == pytest.approx(prices[0].table_us, rel=0.3)


def test_what_delays_host_rows_that_nothing_hides_does_not_make_hidden_ones_dear() -> None:
    model = CostModel(CostTable.rough(LARGE), LARGE)
    device, few = Load.device_decode(18, 18_000), Load.host_decode(2, 2000)
    steps = LARGE.num_layers + 1
    exposed = ((Span(0, 0, steps, True),), {0: device + few})
    hidden = ((Span(0, 0, steps, False), Span(1, 0, steps, True)), {0: device, 1: Load.host_decode(40, 40_000)})
    before_us = model.price(*hidden).total_us
    price = model.price(*exposed)
    assert price.kind is Kind.EXPOSED_DECODE
    for _ in range(300):
        model.observe(price, 2 * price.table_us)
    assert model.price(*exposed).total_us == pytest.approx(2 * price.table_us, rel=0.02)
    assert model.price(*hidden).total_us == pytest.approx(before_us, rel=0.02)


@pytest.mark.parametrize("truth", [0.6, 1.7])
def test_what_the_worker_pool_really_takes_is_learned(truth: float) -> None:
    model = CostModel(table(), SHAPE)
    host = Load.host_decode(4, 400)
    said_us = model.host_lap_us(host)
    spans, loads = [Span(0, 0, SHAPE.num_layers + 1, True)], {0: host}
    before = model.price(spans, loads)
    for _ in range(60):
        model.observe_host([host], truth * said_us)
    assert model.host_lap_us(host) == pytest.approx(truth * said_us, rel=0.02)
    assert model.price(spans, loads).host_us == pytest.approx(truth * before.host_us, rel=0.02)


def pool_beside(late_us: float, factor: float, *seen: Load) -> CostModel:
    """A model that has seen a worker pool whose tasks take that much longer, and their attention so many times as
    long."""
    costs = CostTable.rough(LARGE)
    task_us, token_us = costs.host_task_us + late_us, factor * costs.host_us_per_token
    slow = CostModel(replace(costs, host_task_us=task_us, host_us_per_token=token_us), LARGE)
    model = CostModel(costs, LARGE)
    for turn in range(400):
        lap = seen[turn % len(seen)]
        model.observe_host([lap], slow.host_lap_us(lap))
    return model


FEW, MANY = Load.host_decode(2, 2000), Load.host_decode(80, 80_000)


def test_workers_that_are_late_for_a_few_rows_do_not_make_many_rows_dear() -> None:
    """They would be as late for those; as a factor, it would make eighty rows ten times as dear."""
    late_us = 800.0
    plain, model = CostModel(CostTable.rough(LARGE), LARGE), pool_beside(late_us, 1.0, FEW)
    assert model.host_lap_us(FEW) == pytest.approx(plain.host_lap_us(FEW) + 80 * late_us, rel=0.02)
    assert model.host_lap_us(MANY) == pytest.approx(plain.host_lap_us(MANY) + 80 * late_us, rel=0.1)


def test_a_pool_that_reads_slowly_is_learned_from_laps_of_many_rows() -> None:
    plain, model = CostModel(CostTable.rough(LARGE), LARGE), pool_beside(0.0, 1.5, MANY)
    for lap in (MANY, Load.host_decode(60, 60_000), Load.host_decode(120, 120_000)):
        assert model.host_lap_us(lap) == pytest.approx(1.5 * plain.host_lap_us(lap), rel=0.03)


def test_laps_of_few_and_of_many_rows_tell_what_is_late_from_what_is_slow() -> None:
    plain, model = CostModel(CostTable.rough(LARGE), LARGE), pool_beside(300.0, 1.2, FEW, MANY)
    for lap, factor in ((FEW, 1.2), (MANY, 1.2)):
        attention_us = plain.host_lap_us(lap) - 80 * plain.table.host_task_us
        expected_us = plain.host_lap_us(lap) + (factor - 1) * attention_us + 80 * 300.0
        assert model.host_lap_us(lap) == pytest.approx(expected_us, rel=0.05)


def test_one_lap_that_stalls_says_little_of_the_pool() -> None:
    for lap in (FEW, MANY):
        model = CostModel(CostTable.rough(LARGE), LARGE)
        before_us = model.host_lap_us(lap)
        model.observe_host([lap], 100 * before_us)
        assert before_us < model.host_lap_us(lap) < 1.3 * before_us


def test_what_the_cpu_does_besides_enqueueing_is_learned() -> None:
    """It counts where the CPU is what an iteration waits for; one long step says little."""
    model = CostModel(table(prefill_launch_us=20.0), SHAPE)
    prefill, many = Load.prefill(Tier.DEVICE, 0, 4, samples=True), Load.prefill(Tier.DEVICE, 0, 400, samples=True)
    before = [model.price([whole()], {0: load}) for load in (prefill, many)]
    for _ in range(200):
        model.observe_overhead(1500.0)
    assert model.price([whole()], {0: prefill}).total_us == pytest.approx(80 + 1500, rel=0.02)
    assert model.price([whole()], {0: many}).total_us == before[1].total_us
    model.observe_overhead(1e6)
    assert model.price([whole()], {0: prefill}).total_us == pytest.approx(80 + 1500, rel=0.08)


def test_what_prompts_add_to_a_lap_of_few_rows_is_learned_and_moves_the_ridge_point() -> None:
    """Laps that arithmetic or the CPU bounds do not tell; a lap that advances by a part has a part of it."""
    model = CostModel(table(linear=Curve(H200_LINEAR_US), recorded_rows=RECORDED, prefill_launch_us=300.0), LARGE)
    decodes, whole_lap = Load.device_decode(16, 0), Span(0, 0, LARGE.num_layers + 1, False)

    def lap(rows: int, spans: tuple[Span, ...] = (whole_lap,)) -> Price:
        return model.price(spans, {0: decodes + Load(rows=rows, prefill_rows=rows)})

    before, ridge = lap(48), model.ridge_rows(decodes)
    for _ in range(200):
        model.observe(lap(1000), 3 * lap(1000).table_us)
    assert lap(48).table_us == before.table_us
    for _ in range(200):
        model.observe(lap(48), before.table_us + 9_000.0)
    assert lap(48).total_us == pytest.approx(before.table_us + 9_000, rel=0.02)
    assert lap(240).table_us - lap(240).plain_us == pytest.approx(9_000, rel=0.05)
    assert model.ridge_rows(decodes) > ridge
    part = lap(48, (Span(0, 0, 27, False),))
    assert part.table_us - part.plain_us == pytest.approx(3_000, rel=0.05)
    assert model.price((whole_lap,), {0: decodes}).plain_us is None

    slow_cpu = CostModel(table(linear=Curve(H200_LINEAR_US), prefill_launch_us=3000.0), LARGE)
    assert slow_cpu.price((whole_lap,), {0: Load(rows=48, prefill_rows=48)}).plain_us is None


def test_an_outlier_hardly_moves_the_correction() -> None:
    model = CostModel(table(), SHAPE)
    price = model.price([whole()], {0: Load.device_decode(2, 10)})
    model.observe(price, 1000 * price.table_us)
    assert model.price([whole()], {0: Load.device_decode(2, 10)}).total_us < 1.2 * price.total_us
    for _ in range(5):
        model.observe(price, price.table_us)
    assert model.price([whole()], {0: Load.device_decode(2, 10)}).total_us < 1.05 * price.total_us


def test_rough_numbers_show_what_was_measured_on_the_machine_that_they_describe() -> None:
    """A 70B decode lap of 18 rows takes about 40 ms; r = 4 beats device-only, r = 1 does not."""
    model = CostModel(CostTable.rough(LARGE), LARGE)
    device = Load.device_decode(18, 18 * 1024)
    alone = model.price([Span(0, 0, 81, False)], {0: device}).total_us
    assert 36_000 < alone < 46_000

    def tokens_per_us(ratio: int, rows: int) -> float:
        spans = [Span(0, 0, 81, False), Span(1, 0, -(-81 // ratio), True)]
        price = model.price(spans, {0: device, 1: Load.host_decode(rows, rows * 1024)})
        return (18 + rows / ratio) / price.total_us

    assert tokens_per_us(1, 14) < 18 / alone < tokens_per_us(4, 56)


def ridge_rows(linear: tuple[tuple[int, float], ...], *, launch_us: float = 3.0, pair_us: float = 0.0) -> int:
    costs = table(linear=Curve(linear), prefill_us=29.0, prefill_us_per_pair=pair_us, prefill_launch_us=launch_us)
    return CostModel(costs, LARGE).ridge_rows(Load.device_decode(16, 0))


@pytest.mark.parametrize("noise", [0.97, 1.0, 1.03])
def test_the_ridge_point_hardly_depends_on_the_noise_of_one_measurement(noise: float) -> None:
    """Prompts are cut down to it: a leap to 512 rows would change every program."""
    noisy = tuple(
        [(rows, us * noise if rows == 256 else us / noise if rows == 128 else us) for rows, us in H200_LINEAR_US]
    )
    assert ridge_rows(noisy) in (64, 128, 192)


def test_the_ridge_point_fills_a_recording() -> None:
    costs = table(linear=Curve(H200_LINEAR_US), recorded_rows=RECORDED)
    assert CostModel(costs, LARGE).ridge_rows(Load.device_decode(16, 0)) + 16 in RECORDED


def test_laps_that_take_long_to_launch_have_their_ridge_point_at_more_rows() -> None:
    assert ridge_rows(H200_LINEAR_US, launch_us=1200.0) > ridge_rows(H200_LINEAR_US)


def test_the_ridge_point_does_not_depend_on_what_attention_among_prompts_costs() -> None:
    """Many short prompts make as many rows as a long one: what they attend to is not known from the rows."""
    assert ridge_rows(H200_LINEAR_US, pair_us=1.0) == ridge_rows(H200_LINEAR_US)
