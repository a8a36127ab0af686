"""The program of an iteration walked over two timelines: the device, and the worker pool of the host tier.

The device does its stages one after another. SEND hands a layer's task to the worker pool, which does its tasks in
the order in which they came; RECV holds the device up until the pool has done the task and the output is back.
All layers cost the same, so a long program whose sub-batches go in step is walked over a few layers only and
extrapolated along them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from neoserve.core.program import Op, Span, program

OPS = tuple(Op)
NUM_OPS = len(OPS)
_CODE = {op: code for code, op in enumerate(OPS)}
SEND = _CODE[Op.SEND]
RECV = _CODE[Op.RECV]

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


FREE = StageCosts((0.0,) * NUM_OPS, 0.0, 0.0)


@lru_cache(maxsize=4096)
def stage_codes(num_layers: int, spans: tuple[Span, ...]) -> tuple[int, ...]:
    """`program(...)` with each stage as sub_batch * NUM_OPS + op; its layer does not matter to its price."""
    return tuple(stage.sub_batch * NUM_OPS + _CODE[stage.op] for stage in program(num_layers, spans))


@lru_cache(maxsize=4096)
def _shortened(num_layers: int, spans: tuple[Span, ...], num_steps: int) -> tuple[int, ...]:
    """`stage_codes` of the same program with spans of `num_steps` steps over as few layers as that takes."""
    is_whole = spans[0].num_steps == num_layers + 1
    fewer_layers = num_steps - 1 if is_whole else num_steps + 1
    shortened = []
    for span in spans:
        ends = span.stop_step == num_layers + 1
        first = 0 if span.first_step == 0 else fewer_layers + 1 - num_steps if ends else 1
        shortened.append(Span(span.sub_batch, first, first + num_steps, span.has_host))
    return stage_codes(fewer_layers, tuple(shortened))


def walk_whole(codes: tuple[int, ...], first: StageCosts, second: StageCosts) -> float:
    """When the device is done with the stages."""
    device_us = first.device_us + second.device_us
    now = host_free = 0.0
    output_at = [0.0, 0.0]
    for code in codes:
        if code % NUM_OPS == RECV:
            now = max(now, output_at[code // NUM_OPS])
        now += device_us[code]
        if code % NUM_OPS == SEND:
            costs = second if code > NUM_OPS else first
            host_free = max(host_free, now + costs.handoff_us / 2) + costs.host_us
            output_at[code // NUM_OPS] = host_free + costs.handoff_us / 2
    return now


def walk_us(num_layers: int, spans: tuple[Span, ...], first: StageCosts, second: StageCosts) -> float:
    """Microseconds from the program's first stage to the end of its last one on the device; costs by sub-batch."""
    num_steps = spans[0].num_steps
    if num_steps <= _MORE or any(span.num_steps != num_steps for span in spans):
        return walk_whole(stage_codes(num_layers, spans), first, second)
    few_us = walk_whole(_shortened(num_layers, spans, _FEW), first, second)
    more_us = walk_whole(_shortened(num_layers, spans, _MORE), first, second)
    return more_us + (more_us - few_us) / (_MORE - _FEW) * (num_steps - _MORE)
