"""The program of an iteration walked over two timelines: the device, and the worker pool of the host tier.

The device does its stages one after another. SEND hands a layer's task to the worker pool, which does its tasks in
the order in which they came; RECV holds the device up until the pool has done the task and the output is back.
All layers cost the same, so a long program whose sub-batches go in step is walked over a few layers only and
extrapolated along them; and of what the device does between two hand-offs there are only a few kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from neoserve.core.program import Op, Span, program

OPS = tuple(Op)
_NUM_OPS = len(OPS)
_CODE = {op: code for code, op in enumerate(OPS)}

_FEW, _MORE = 4, 6  # steps that a long program is extrapolated from


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What the stages of one sub-batch cost.

    device_us: of each op, in the order of `OPS`. host_us: one layer's task on the worker pool.
    handoff_us: from SEND to the pool's start and again from its end to RECV's, added up.
    """

    device_us: tuple[float, ...]
    host_us: float
    handoff_us: float


FREE = StageCosts((0.0,) * _NUM_OPS, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Itinerary:
    """A program as what the device does up to each hand-off, and after the last one.

    stretches: those that differ, each as its stages, sub_batch * number of ops + op; their layers do not matter.
    stops: of the program in order, the stretch and the hand-off that ends it, as its sub-batch and whether it is SEND.
    last: the stretch after them.
    """

    stretches: tuple[tuple[int, ...], ...]
    stops: tuple[tuple[int, int, bool], ...]
    last: int


@lru_cache(maxsize=4096)
def itinerary(num_layers: int, spans: tuple[Span, ...]) -> Itinerary:
    """Of `program(num_layers, spans)`."""
    stretches: dict[tuple[int, ...], int] = {}
    stops = []
    codes: list[int] = []

    def end_stretch() -> int:
        index = stretches.setdefault(tuple(codes), len(stretches))
        codes.clear()
        return index

    for stage in program(num_layers, spans):
        if stage.op in (Op.SEND, Op.RECV):
            stops.append((end_stretch(), stage.sub_batch, stage.op is Op.SEND))
        else:
            codes.append(stage.sub_batch * _NUM_OPS + _CODE[stage.op])
    last = end_stretch()
    return Itinerary(tuple(stretches), tuple(stops), last)


@lru_cache(maxsize=4096)
def _shortened(num_layers: int, spans: tuple[Span, ...], num_steps: int) -> Itinerary:
    """`itinerary` of the same program with spans of `num_steps` steps over as few layers as that takes."""
    is_whole = spans[0].num_steps == num_layers + 1
    fewer_layers = num_steps - 1 if is_whole else num_steps + 1
    shortened = []
    for span in spans:
        ends = span.stop_step == num_layers + 1
        first = 0 if span.first_step == 0 else fewer_layers + 1 - num_steps if ends else 1
        shortened.append(Span(span.sub_batch, first, first + num_steps, span.has_host))
    return itinerary(fewer_layers, tuple(shortened))


def walk_whole(way: Itinerary, first: StageCosts, second: StageCosts) -> float:
    """When the device is done with the program."""
    device_us = first.device_us + second.device_us
    takes_us = [sum([device_us[code] for code in stages]) for stages in way.stretches]
    costs = (first, second)
    now = host_free = 0.0
    output_at = [0.0, 0.0]
    for stretch, sub_batch, is_send in way.stops:
        now += takes_us[stretch]
        if is_send:
            half_us = costs[sub_batch].handoff_us / 2
            host_free = max(host_free, now + half_us) + costs[sub_batch].host_us
            output_at[sub_batch] = host_free + half_us
        else:
            now = max(now, output_at[sub_batch])
    return now + takes_us[way.last]


def walk_us(num_layers: int, spans: tuple[Span, ...], first: StageCosts, second: StageCosts) -> float:
    """Microseconds from the program's first stage to the end of its last one on the device; costs by sub-batch."""
    num_steps = spans[0].num_steps
    if num_steps <= _MORE or any(span.num_steps != num_steps for span in spans):
        return walk_whole(itinerary(num_layers, spans), first, second)
    few_us = walk_whole(_shortened(num_layers, spans, _FEW), first, second)
    more_us = walk_whole(_shortened(num_layers, spans, _MORE), first, second)
    return more_us + (more_us - few_us) / (_MORE - _FEW) * (num_steps - _MORE)
