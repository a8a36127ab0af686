"""The candidates of an iteration: what it could do, which rows go to which sub-batch, and what that would take.

A candidate's *rate* is the worth of what it gets done (a host lap that gets a quarter of its way counts a quarter) over
its predicted time; `split` says what is worth how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from neoserve.core.plan import Tier
from neoserve.core.program import Span
from neoserve.scheduling.cost import CostModel, Price
from neoserve.scheduling.load import Load


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next rows of a prompt. samples: they end with the last given token."""

    tier: Tier
    start: int
    count: int
    samples: bool


class Pace(NamedTuple):
    """How fast to compute prompts. prompt_rows: for each token that is generated. fills_host: rather more rows than
    that than fewer, so that host rows come to be as many as are wanted. is_calm: no request waits to be admitted, so
    that first tokens count for more than what prompts cost.
    """

    prompt_rows: float
    fills_host: bool = False
    is_calm: bool = False


NO_PACE = Pace(0.0)


@dataclass(frozen=True, slots=True)
class Work:
    """What an iteration could do.

    reference: decode rows of as many sequences as the device pool could hold. device: all decode rows of DEVICE
    sequences. chunks: of prompts, oldest first. pace: how fast to compute them.
    host_tokens: KV tokens of each HOST sequence that could decode, in the order in which they go to sub-batch 1.
    lap, lap_step: the host lap in flight in sub-batch 1 and its next step.
    must_run_host: host rows have waited long enough.
    """

    reference: Load
    device: Load
    chunks: tuple[Chunk, ...]
    pace: Pace
    host_tokens: tuple[int, ...]
    lap: Load | None
    lap_step: int
    must_run_host: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What an iteration will do.

    prefill_rows: the most rows of the chunks that go to each sub-batch (`deal`). num_host: HOST sequences that begin
    a lap in each; the first num_host[1] of them go to sub-batch 1. lap_steps: steps that sub-batch 1 advances, begun
    now or earlier. decode_rows: tokens that its decodes generate, of a lap that goes on as large a part as it gets
    done. rate: worth over time, 1 where everything costs what it is worth.
    """

    prefill_rows: tuple[int, int]
    num_host: tuple[int, int]
    lap_steps: int
    price: Price
    decode_rows: float
    rate: float


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a chunk that go to one sub-batch: `count` after the chunk's first `offset`.

    continues: sub-batch 0 has the rows before them. ends: they are the chunk's last.
    """

    index: int
    sub_batch: int
    offset: int
    count: int
    continues: bool
    ends: bool


def deal(chunks: Sequence[Chunk], limits: tuple[int, int]) -> Iterator[Part]:
    """Which rows go where: the first limits[0] rows to sub-batch 0, the next limits[1] to sub-batch 1."""
    boundary, end = limits[0], limits[0] + limits[1]
    position = 0
    for index, chunk in enumerate(chunks):
        stop = min(position + chunk.count, end)
        for sub_batch, first, last in ((0, position, min(stop, boundary)), (1, max(position, boundary), stop)):
            if first < last:
                offset = first - position
                ends = last == position + chunk.count
                yield Part(index, sub_batch, offset, last - first, sub_batch == 1 and offset > 0, ends)
        position = stop


def _prefill_loads(chunks: Sequence[Chunk], limits: tuple[int, int]) -> tuple[Load, Load]:
    """The loads that `deal` gives the sub-batches."""
    loads = [Load(), Load()]
    for part in deal(chunks, limits):
        chunk = chunks[part.index]
        loads[part.sub_batch] += Load.prefill(
            chunk.tier, chunk.start + part.offset, part.count, chunk.samples and part.ends, continues=part.continues
        )
    return loads[0], loads[1]


class Pricing:
    """Prices the candidates of one iteration, each once: searches from several sides meet many of them again.

    decode_us, prefill_row_us: what a decode token and a prefill row are worth.
    """

    def __init__(self, cost: CostModel, num_steps: int, work: Work, decode_us: float, prefill_row_us: float) -> None:
        self.work = work
        self._cost = cost
        self._num_steps = num_steps
        self._decode_us = decode_us
        self._prefill_row_us = prefill_row_us
        self._host_tokens = tuple(accumulate(work.host_tokens, initial=0))
        self._prefill: dict[tuple[int, int], tuple[Load, Load]] = {}
        self._choices: dict[tuple[tuple[int, int], int, int, int], Choice] = {}

    def price(self, prefill_rows: tuple[int, int], num_first: int, num_second: int, lap_steps: int) -> Choice:
        """The candidate with this split; `lap_steps` of a lap in flight, or of one that begins with `num_second`."""
        key = (prefill_rows, num_first, num_second, lap_steps)
        if key not in self._choices:
            self._choices[key] = self._price(*key)
        return self._choices[key]

    def _price(self, prefill_rows: tuple[int, int], num_first: int, num_second: int, lap_steps: int) -> Choice:
        work = self.work
        first, second = self._prefill_loads(prefill_rows)
        first += work.device
        if num_first:
            first += self._host_load(num_second, num_second + num_first)
        if num_second:
            second += self._host_load(0, num_second)
        if work.lap:
            second = work.lap
        spans, loads, all_rows, all_prefill_rows = [], {}, 0.0, 0.0
        if first.rows:
            spans.append(Span(0, 0, self._num_steps, num_first > 0))
            loads[0] = first
            all_rows, all_prefill_rows = first.rows, first.prefill_rows
        if lap_steps:
            spans.append(Span(1, work.lap_step, work.lap_step + lap_steps, second.host_rows > 0))
            loads[1] = second
            part = lap_steps / self._num_steps
            all_rows, all_prefill_rows = all_rows + part * second.rows, all_prefill_rows + part * second.prefill_rows
        price = self._cost.price(spans, loads)
        decode_rows = all_rows - all_prefill_rows
        worth_us = decode_rows * self._decode_us + all_prefill_rows * self._prefill_row_us
        return Choice(prefill_rows, (num_first, num_second), lap_steps, price, decode_rows, worth_us / price.total_us)

    def device_only(self, prefill_rows: int) -> Choice | None:
        """The candidate without any host rows; `None` if there is nothing else."""
        if not (self.work.device.rows or prefill_rows):
            return None
        return self.price((prefill_rows, 0), 0, 0, 0)

    def _prefill_loads(self, limits: tuple[int, int]) -> tuple[Load, Load]:
        if limits not in self._prefill:
            self._prefill[limits] = _prefill_loads(self.work.chunks, limits)
        return self._prefill[limits]

    def _host_load(self, first: int, stop: int) -> Load:
        return Load.host_decode(stop - first, self._host_tokens[stop] - self._host_tokens[first])
