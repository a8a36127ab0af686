"""What an iteration will take: its program walked with the measured costs of its parts (`CostTable`)."""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from neoserve.core.config import ModelShape
from neoserve.core.program import Op, Span, attends_on_host
from neoserve.scheduling.corrections import Correction, PoolCorrection, Slowdown, Surcharge
from neoserve.scheduling.load import Load
from neoserve.scheduling.table import CostTable
from neoserve.scheduling.timeline import FREE, OPS, StageCosts, walk_us


class Kind(enum.Enum):
    """Kinds of iteration whose predictions are corrected apart from each other.

    The exposed have host rows in their only sub-batch: whatever delays those delays the iteration, which says nothing
    of how well another sub-batch hides it.
    """

    DEVICE_DECODE = "device decode"
    DEVICE_PREFILL = "device prefill"
    EXPOSED_DECODE = "exposed decode"
    EXPOSED_PREFILL = "exposed prefill"
    PIPELINED_DECODE = "pipelined decode"
    PIPELINED_PREFILL = "pipelined prefill"

    @classmethod
    def of(cls, spans: Sequence[Span], *, prefill: bool) -> Kind:
        """prefill: some lap has rows of a prompt."""
        if not attends_on_host(spans):
            return cls.DEVICE_PREFILL if prefill else cls.DEVICE_DECODE
        if len(spans) == 1:
            return cls.EXPOSED_PREFILL if prefill else cls.EXPOSED_DECODE
        return cls.PIPELINED_PREFILL if prefill else cls.PIPELINED_DECODE


@dataclass(frozen=True, slots=True)
class Price:
    """What an iteration is predicted to take. Times in microseconds.

    total_us: with the corrections from earlier iterations; table_us: without them.
    device_us: the device's stages without waiting. host_us: the worker pool's tasks. launch_us: enqueueing, without
    what else the CPU does for an iteration. plain_us: of a lap of few rows that shows what prompts add to it, its time
    without that.
    """

    kind: Kind
    total_us: float
    table_us: float
    device_us: float
    host_us: float
    launch_us: float
    plain_us: float | None = None


_FEWEST_FILLING = 0.75  # of the prompt rows that are asked for: where that does not fill a recording, more do
_NEAR = 0.15  # of the prompt rows that are asked for: so many more or fewer may take less time each
_RIDGE_ROWS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # compared


class CostModel:
    """Prices iterations, and learns what they take: a factor for each kind of them, and a passing one for all; what
    the worker pool takes; how long the CPU plans an iteration and hands out its tokens; and what the device takes for a
    lap because it has prompts, however few: it is not recorded as a whole, and between two of its kernels there is a
    pause.
    """

    _WINDOW = 256

    def __init__(self, table: CostTable, shape: ModelShape) -> None:
        self.table = table
        self._num_layers = shape.num_layers
        self._pre_share = shape.pre_parameters / shape.layer_parameters
        self._correction = {kind: Correction() for kind in Kind}
        self._slowdown = Slowdown()
        self._pool = PoolCorrection(table.host_task_us)
        self._overhead = Surcharge()
        self._prompts = Surcharge()
        self._costs_of = lru_cache(maxsize=64)(self.stage_costs)  # candidates of an iteration share most loads
        self._errors: deque[float] = deque(maxlen=self._WINDOW)

    @property
    def error(self) -> float:
        """Median of |predicted - measured| / measured over the latest iterations; 0 before the first."""
        return median(self._errors) if self._errors else 0.0

    def price(self, spans: Sequence[Span], loads: Mapping[int, Load]) -> Price:
        """Price of the program of `spans`; `loads` by sub-batch index."""
        program_spans = tuple(spans)
        costs = [self._costs_of(loads[index]) if index in loads else FREE for index in (0, 1)]
        device_us = host_us = launch_us = 0.0
        for span in program_spans:
            device_us += self._device_us(span, costs[span.sub_batch])
            host_us += self._host_tasks(span) * costs[span.sub_batch].host_us
            launch_us += self._launch_us(span, loads[span.sub_batch], alone=len(program_spans) == 1)
        with_prompts = [span for span in program_spans if loads[span.sub_batch].prefill_rows]
        prompts_us = self._prompts.us * sum(span.num_steps for span in with_prompts) / (self._num_layers + 1)
        walked_us = walk_us(self._num_layers, program_spans, *costs) + prompts_us
        cpu_us = launch_us + self._overhead.us
        table_us = max(walked_us, host_us, cpu_us)
        kind = Kind.of(program_spans, prefill=bool(with_prompts))
        first = loads[program_spans[0].sub_batch]
        tells = (
            kind is Kind.DEVICE_PREFILL
            and len(program_spans) == 1
            and walked_us > cpu_us
            and self._reads_bound(self._computed_rows(first, first.rows))
        )
        return Price(
            kind,
            table_us * self._correction[kind].factor * self._slowdown.factor,
            table_us,
            device_us,
            host_us,
            launch_us,
            walked_us - prompts_us if tells else None,
        )

    def host_lap_us(self, load: Load) -> float:
        """Time of the worker pool for a lap of the load's host rows."""
        return self._num_layers * self._task_us(load)

    def prefill_row_us(self) -> float:
        """What a prefill row adds to an iteration whose linear layers are busy with many others."""
        linear, (most, most_us) = self.table.linear, self.table.linear.points[-1]
        half = most / 2
        return self._num_layers * (max(0.0, most_us - linear.at(half)) / half or most_us / most)

    def filling(self, prompt_rows: int, decode_rows: int) -> int:
        """About so many prompt rows, with which a lap of so many decodes fills a recording; where nothing is recorded
        for so many and arithmetic bounds it, with which it takes the linear layers the least time a row."""
        if not prompt_rows:
            return 0
        recorded = self.table.recorded_rows
        rows = prompt_rows + decode_rows
        fitting = [size for size in recorded if size - decode_rows >= _FEWEST_FILLING * prompt_rows]
        if fitting and rows - recorded[-1] <= (recorded[-1] - recorded[-2:][0]) / 2:
            return min(fitting, key=lambda size: abs(size - rows)) - decode_rows
        if self._reads_bound(rows):
            return prompt_rows
        linear, distance = self.table.linear, _NEAR * prompt_rows
        first = bisect_left(linear.points, (rows - distance,))
        end = bisect_right(linear.points, (rows + distance, float("inf")))
        near = [int(size) for size, _ in linear.points[first:end] if not recorded or size > recorded[-1]]
        return min((rows, *near), key=lambda size: linear.at(size) / size) - decode_rows

    def ridge_rows(self, decodes: Load) -> int:
        """Where a lap is no more bound by its reads and its launches and not yet by arithmetic: of the numbers of
        prompt rows that it could compute beside these decodes, the one whose rows add the least time each. Attention
        among prompts is left out: it is the same in whatever laps."""

        def lap_us(rows: int) -> float:
            load = decodes + Load(rows=rows, prefill_rows=rows)
            return self.price((Span(0, 0, self._num_layers + 1, False),), {0: load}).table_us

        decodes_us = lap_us(0)
        candidates = [self.filling(rows, decodes.rows) for rows in _RIDGE_ROWS]
        return min(candidates, key=lambda rows: (lap_us(rows) - decodes_us) / rows)

    def observe(self, price: Price, measured_us: float) -> None:
        """Compare a price with what the iteration took and correct later prices of its kind."""
        if measured_us <= 0 or price.table_us <= 0:
            return
        self._errors.append(abs(price.total_us - measured_us) / measured_us)
        ratio = measured_us / price.table_us
        slowdown, correction = self._slowdown.factor, self._correction[price.kind].factor
        self._slowdown.observe(ratio / (slowdown * correction))
        self._correction[price.kind].observe(ratio / slowdown)
        if price.plain_us is not None:
            self._prompts.observe(measured_us - price.plain_us)

    def observe_host(self, laps: Sequence[Load], measured_us: float) -> None:
        """Compare what `host_lap_us` says of these laps with what the worker pool took for them all, and correct later
        prices of its tasks."""
        if measured_us <= 0 or not laps:
            return
        attention_us = sum(map(self._attention_us, laps)) / len(laps)
        self._pool.observe(attention_us, measured_us / (self._num_layers * len(laps)))
        self._costs_of.cache_clear()

    def observe_overhead(self, measured_us: float) -> None:
        """Learn from what the CPU took for an iteration besides enqueueing it."""
        self._overhead.observe(measured_us)

    def stage_costs(self, load: Load) -> StageCosts:
        table = self.table
        linear_us = table.linear.at(self._computed_rows(load, load.rows))
        last_linear_us = table.linear.at(self._computed_rows(load, load.samples)) if load.samples else 0.0
        attend_us = 0.0
        if load.device_tokens:
            attend_us += table.device_decode_us + load.device_tokens * table.device_us_per_token
        if load.prefill_rows:
            attend_us += table.prefill_us + load.prefill_pairs * table.prefill_us_per_pair
            # What goes out and comes in does so beside the layer's other work (execution/staging.py).
            staging_us = (load.staged_tokens + load.staged_rows) * table.migration_us_per_token / self._num_layers
            attend_us = max(attend_us, staging_us - linear_us)
        device_us = [0.0] * len(OPS)
        device_us[_EMBED] = table.embed.at(load.rows)
        device_us[_PRE] = linear_us * self._pre_share
        device_us[_ATTEND] = attend_us
        device_us[_POST] = linear_us * (1 - self._pre_share)
        device_us[_HEAD] = table.head.at(load.samples) if load.samples else 0.0
        device_us[_HEAD] -= (linear_us - last_linear_us) * (1 - self._pre_share)  # POST before it has fewer rows
        handoff_us = table.handoff_us + load.host_rows * table.handoff_us_per_row
        return StageCosts(tuple(device_us), self._task_us(load), handoff_us)

    def _reads_bound(self, num_rows: int) -> bool:
        """Whether the linear layers take at most twice as long for so many rows as for one."""
        return self.table.linear.at(num_rows) <= 2 * self.table.linear.at(1)

    def _computed_rows(self, load: Load, num_rows: int) -> int:
        """Rows that the linear layers compute for so many of a load."""
        if load.prefill_rows or load.host_rows:
            return next((size for size in self.table.recorded_rows if size >= num_rows), num_rows)
        return num_rows

    def _task_us(self, load: Load) -> float:
        """One layer's host attention, hand-off apart."""
        if not load.host_rows:
            return 0.0
        return self._pool.predict_us(self._attention_us(load))

    def _attention_us(self, load: Load) -> float:
        """What one layer's host rows add to a task, by the table."""
        return load.host_tokens * self.table.host_us_per_token + load.host_rows * self.table.host_us_per_row

    def _device_us(self, span: Span, costs: StageCosts) -> float:
        """Time in which the device works on a span."""
        begins, ends = span.first_step == 0, span.stop_step == self._num_layers + 1
        us = costs.device_us
        total_us = begins * us[_EMBED] + ends * us[_HEAD] + (span.num_steps - begins) * us[_POST]
        return total_us + (span.num_steps - ends) * (us[_PRE] + us[_ATTEND])

    def _host_tasks(self, span: Span) -> int:
        """Layers that a span sends to the worker pool."""
        return (span.num_steps - (span.stop_step == self._num_layers + 1)) * span.has_host

    def _launch_us(self, span: Span, load: Load, *, alone: bool) -> float:
        """Enqueueing: a lap of device decodes that runs alone replays one recording, all else goes by layers."""
        table = self.table
        if not span.has_host and not load.prefill_rows:
            if alone and span.num_steps == self._num_layers + 1:
                return table.graph_launch_us
            return span.num_steps * table.decode_launch_us
        layer_us = span.has_host * table.host_launch_us
        layer_us += bool(load.prefill_rows) * table.prefill_launch_us + bool(load.staged_rows) * table.staged_launch_us
        return span.num_steps * layer_us


_EMBED, _PRE, _ATTEND, _POST, _HEAD = (OPS.index(op) for op in (Op.EMBED, Op.PRE, Op.ATTEND, Op.POST, Op.HEAD))
