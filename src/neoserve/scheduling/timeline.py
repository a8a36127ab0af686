"""The program of an iteration walked over two timelines: the device, and the worker pool of the host tier.

The device does its stages one after another. SEND hands a layer's task to the worker pool, which does its tasks in
the order in which they came; RECV holds the device up until the pool has done the task and the output is back.
All layers cost the same, so a long program is walked over a few layers only and extrapolated along them.
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

_WALKED_WHOLE = 14  # steps: programs up to this long are not worth extrapolating
_SHORT, _LONG = 2, 4  # steps of the shorter span in the two walks that a long program is extrapolated from


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
def _walks(num_layers: int, spans: tuple[Span, ...]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The walks (stage codes, steps of the longest span) that price a program: itself, or a long and a short one."""
    longest = max(span.num_steps for span in spans)
    shortest = min(span.num_steps for span in spans)
    if longest <= _WALKED_WHOLE or shortest <= _LONG:
        return ((stage_codes(num_layers, spans), longest),)
    walks = []
    for periods in (_LONG, _SHORT):
        fewer_layers, shortened = _shortened(num_layers, spans, periods)
        steps = max(span.num_steps for span in shortened)
        walks.append((stage_codes(fewer_layers, shortened), steps))
    return tuple(walks)


def _shortened(num_layers: int, spans: tuple[Span, ...], periods: int) -> tuple[int, tuple[Span, ...]]:
    """The same program with the shortest span cut to `periods` steps and the others in proportion."""
    shortest = min(span.num_steps for span in spans)
    kept = min(shortest, periods)
    steps = [max(1, round(span.num_steps * kept / shortest)) for span in spans]
    whole = [span.num_steps == num_layers + 1 for span in spans]
    fewer_layers = max(n - 1 if full else n + 1 for n, full in zip(steps, whole, strict=True))
    shortened = []
    for span, n in zip(spans, steps, strict=True):
        if span.first_step == 0:
            first = 0
        elif span.stop_step == num_layers + 1:
            first = fewer_layers + 1 - n
        else:
            first = 1
        shortened.append(Span(span.sub_batch, first, first + n, span.has_host))
    return fewer_layers, tuple(shortened)


def _walk(codes: tuple[int, ...], first: StageCosts, second: StageCosts) -> float:
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
    walks = _walks(num_layers, spans)
    codes, steps = walks[0]
    total_us = _walk(codes, first, second)
    if len(walks) > 1:
        shorter_codes, shorter_steps = walks[1]
        step_us = (total_us - _walk(shorter_codes, first, second)) / (steps - shorter_steps)
        total_us += step_us * (max(span.num_steps for span in spans) - steps)
    return total_us
