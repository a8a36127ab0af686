"""The order of stages: what the executor enqueues and the cost model prices."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoserve.core.program import Op, Span, Stage, program

LAYERS = 4


def steps(spans: list[Span], num_layers: int = LAYERS) -> list[int]:
    """The sub-batch of each step in order; a step ends with ATTEND or HEAD."""
    return [stage.sub_batch for stage in program(num_layers, spans) if stage.op in (Op.ATTEND, Op.HEAD)]


def test_one_sub_batch_is_the_plain_order() -> None:
    stages = list(program(2, [Span(0, 0, 3, False)]))
    assert stages == [
        Stage(Op.EMBED, 0, 0),
        Stage(Op.PRE, 0, 0),
        Stage(Op.ATTEND, 0, 0),
        Stage(Op.POST, 0, 0),
        Stage(Op.PRE, 1, 0),
        Stage(Op.ATTEND, 1, 0),
        Stage(Op.POST, 1, 0),
        Stage(Op.HEAD, 1, 0),
    ]


def test_lock_step_alternates() -> None:
    assert steps([Span(0, 0, 5, True), Span(1, 0, 5, True)]) == [0, 1] * 5


@given(num_layers=st.integers(7, 90), ratio=st.integers(2, 8))
def test_the_steps_of_a_slow_lap_lie_evenly(num_layers: int, ratio: int) -> None:
    """Between two steps of the host sub-batch stand `ratio` of the other's, give or take one."""
    slow = -(-(num_layers + 1) // ratio)
    order = steps([Span(0, 0, num_layers + 1, False), Span(1, 0, slow, True)], num_layers)
    places = [place for place, sub_batch in enumerate(order) if sub_batch == 1]
    gaps = [after - before - 1 for before, after in pairwise(places)]
    assert order.count(0) == num_layers + 1
    assert len(places) == slow
    assert all((num_layers + 1) / slow - 1 <= gap <= (num_layers + 1) / slow + 1 for gap in gaps)


@given(
    num_layers=st.integers(1, 12),
    hosts=st.tuples(st.booleans(), st.booleans()),
    cut=st.tuples(st.integers(0, 11), st.integers(1, 13)),
)
def test_every_stage_comes_once_and_in_order(num_layers: int, hosts: tuple[bool, bool], cut: tuple[int, int]) -> None:
    first, stop = min(cut[0], num_layers), min(max(cut[1], cut[0] + 1), num_layers + 1)
    spans = [Span(0, 0, num_layers + 1, hosts[0]), Span(1, first, stop, hosts[1])]
    for span in spans:
        stages = [stage for stage in program(num_layers, spans) if stage.sub_batch == span.sub_batch]
        alone = list(program(num_layers, [span]))
        assert stages == alone
        for layer in range(num_layers):
            ops = [stage.op for stage in stages if stage.layer == layer]
            if Op.SEND in ops and Op.RECV in ops:
                assert ops.index(Op.SEND) < ops.index(Op.ATTEND) < ops.index(Op.RECV) < ops.index(Op.POST)
        assert span.has_host or not {Op.SEND, Op.RECV} & {stage.op for stage in stages}


def test_laps_cut_in_any_way_have_the_same_stages() -> None:
    whole = list(program(LAYERS, [Span(1, 0, 5, True)]))
    parts = [stage for a, b in ((0, 1), (1, 3), (3, 5)) for stage in program(LAYERS, [Span(1, a, b, True)])]
    assert parts == whole


def test_a_span_beyond_the_lap_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        list(program(LAYERS, [Span(0, 0, 6, False)]))
