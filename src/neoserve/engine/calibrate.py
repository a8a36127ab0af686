"""Measure what an iteration's parts cost on this machine: seconds at start-up, kept on disk by model and machine."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

import neoserve
from neoserve import _native
from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import HostAttentionError
from neoserve.core.plan import IterationPlan, Rows, SubBatch, Tier
from neoserve.core.program import Span
from neoserve.core.request import Request, SamplingParams
from neoserve.device.base import PagedBatch
from neoserve.execution.executor import Executor
from neoserve.execution.handoff import FLAG_WORDS
from neoserve.execution.head import GROUP_ROWS
from neoserve.models.decoder import split_qkv
from neoserve.scheduling.table import CostTable, Curve

REPEATS = 5
CHAINED = 16
"""Tasks of the worker pool, or hand-offs, measured one after the other."""
DECODES = 16
"""Rows of decodes that laps are enqueued with to see how long it takes."""
SIZES = (1, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Numbers of rows that are measured."""
MORE_SIZES = (*range(288, 1280, 32), *range(1280, 2048, 128))
"""And for the linear layers on a GPU: up to a tenth more time a row is spent on one of them than on the next."""
MAX_RECORDED_ROWS = 256
HEATING_S, SUSTAINED_S = 1.0, 0.08
"""How long the most rows, and then each other number of them, go through the linear layers on a GPU, the most first and
without a pause: matrix products of an H200 are up to a quarter slower after a second of them than in the first
milliseconds, those of few rows above all, because its limit of power lowers its clocks."""
MAX_LAYERS = 8
"""Layers that a linear measurement goes through: enough that none finds its weights in a cache."""


def cache_folder() -> Path:
    """Where measurements are kept: NEO_CACHE_DIR, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neoserve"
    return Path(os.environ.get("NEO_CACHE_DIR", default))


def cost_table(executor: Executor) -> CostTable:
    """The costs of this model on this machine: from the disk if they were measured before, else measured now."""
    path = cache_folder() / f"costs-{_fingerprint(executor)}.json"
    try:
        return CostTable.from_json(path.read_text())
    except (OSError, ValueError):
        pass
    table = Calibration(executor).measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(table.to_json())
        partial.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next start some seconds, no more
    return table


def _fingerprint(executor: Executor) -> str:
    """What the costs depend on: the model's shape, the sizes measured, the hardware, and the versions of the code."""
    config: ResolvedConfig = executor.config
    facts = (
        config.shape, config.dtype, config.block_size, config.max_num_batched_tokens, config.max_num_seqs,
        config.device_blocks > 0, config.host_blocks > 0, config.worker_cpus, config.enforce_eager,
        executor.recorded_rows, executor.device.name, platform.processor(), os.cpu_count(),
        _native.default_instruction_set(), torch.__version__, torch.get_num_threads(), neoserve.__version__,
        _code_hash(),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def _code_hash() -> str:
    """Of what is measured and how, which changes between versions too: the compiled module, the kernels, this file."""
    kernels = Path(__file__).parents[1] / "kernels"
    code = hashlib.sha256()
    for path in (Path(_native.__file__), *sorted(kernels.glob("*.py")), Path(__file__)):
        code.update(path.read_bytes())
    return code.hexdigest()


class Calibration:
    """The measurements. They write into both pools, so no request may be running."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._config = executor.config
        self._shape = executor.config.shape
        self._model = executor.model
        self._device = executor.device
        self._layers = executor.model.layers[:MAX_LAYERS]
        self._rough = CostTable.rough(self._shape)

    def measure(self) -> CostTable:
        """All costs; those of a tier that is not there are `CostTable.rough`'s, which nothing asks for."""
        decode_us, us_per_token = self._device_decode()
        prefill_us, us_per_pair = self._prefill()
        task_us, host_us_per_token, us_per_row = self._host_attention()
        handoff_us, handoff_us_per_row = self._handoff()
        return CostTable(
            linear=self._linear(),
            head=_curve(self._head_us, SIZES, self._config.max_num_seqs),
            embed=_curve(self._embed_us, SIZES, self._config.max_num_batched_tokens),
            device_decode_us=decode_us,
            device_us_per_token=us_per_token,
            prefill_us=prefill_us,
            prefill_us_per_pair=us_per_pair,
            host_task_us=task_us,
            host_us_per_token=host_us_per_token,
            host_us_per_row=us_per_row,
            handoff_us=handoff_us,
            handoff_us_per_row=handoff_us_per_row,
            **self._launches_us(),
            migration_us_per_token=self._migration_us_per_token(),
            recorded_rows=self._executor.recorded_rows,
        )

    def _time_us(self, work: Callable[[], None], *, recorded: bool = False, least_s: float = 0.0) -> float:
        """Median time of `work` on the device, once warm; `recorded` for work that enqueueing would outlast."""
        self._device.submit(work).wait()
        if recorded:
            replays: list[Callable[[], None]] = []
            self._device.submit(lambda: replays.append(self._device.record(work, shared=False))).wait()
            work = replays[0]
        times: list[float] = []
        while len(times) < REPEATS or sum(times) < least_s * 1e6:
            completion = self._device.submit(work)
            completion.wait()
            times.append(completion.elapsed_us())
        return statistics.median(times)

    def _random(self, *size: int) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, self._config.dtype)
        return self._made(lambda: torch.empty(size, dtype=dtype, device=self._device.torch_device).normal_())

    def _zero_ids(self, num_rows: int) -> torch.Tensor:
        """Positions, or token ids."""
        return self._made(lambda: torch.zeros(num_rows, dtype=torch.int64, device=self._device.torch_device))

    def _made(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor made on the stream that will use it."""
        made: list[torch.Tensor] = []
        self._device.submit(lambda: made.append(make())).wait()
        return made[0]

    def _linear(self) -> Curve:
        """The linear layers, recorded or not as they will be."""
        most, recorded, least_s = self._config.max_num_batched_tokens, self._executor.recorded_rows, 0.0
        sizes, on_gpu = {*SIZES, *recorded}, self._config.device == "cuda"
        if on_gpu:
            sizes.update(size for size in MORE_SIZES if size > max(recorded, default=0))
            least_s = SUSTAINED_S
            self._linear_us(most, recorded=False, least_s=HEATING_S)

        def time_us(num_rows: int) -> float:
            return self._linear_us(num_rows, recorded=num_rows <= max((MAX_RECORDED_ROWS, *recorded)), least_s=least_s)

        return _curve(time_us, sizes, most, may_fall=on_gpu)

    def _linear_us(self, num_rows: int, *, recorded: bool, least_s: float) -> float:
        x_TE = self._random(num_rows, self._shape.hidden_size)
        attn_THD = self._random(num_rows, self._shape.num_query_heads, self._shape.head_dim)
        positions_T = self._zero_ids(num_rows)

        def work() -> None:
            residual_TE = torch.zeros_like(x_TE)
            for layer in self._layers:
                _, residual_TE = layer.before_attention(x_TE.clone(), residual_TE, positions_T)
                layer.after_attention(attn_THD, residual_TE)

        return self._time_us(work, recorded=recorded, least_s=least_s) / len(self._layers)

    def _head_us(self, num_rows: int) -> float:
        x_TE = self._random(num_rows, self._shape.hidden_size)

        def work() -> None:
            for first in range(0, num_rows, GROUP_ROWS):
                self._model.head(x_TE[first : first + GROUP_ROWS]).argmax(-1)

        return self._time_us(work)

    def _embed_us(self, num_rows: int) -> float:
        ids_T = self._zero_ids(num_rows)

        def work() -> None:
            self._model.embed(ids_T)

        return self._time_us(work)

    def _attention_us(self, num_sequences: int, rows_each: int, length: int, decode: bool) -> float:
        """One layer's attention of sequences that share blocks of the device pool (or the staging area)."""
        store = self._executor.store
        kv_LN2KPD = store.device_LN2KPD if self._config.device_blocks else store.staging_LN2KPD
        blocks_each = self._config.blocks_for(length)
        block_ids = np.arange(num_sequences * blocks_each, dtype=np.int32) % kv_LN2KPD.shape[1]
        batch = PagedBatch(
            row_start=np.arange(num_sequences + 1, dtype=np.int32) * rows_each,
            block_start=np.arange(num_sequences + 1, dtype=np.int32) * blocks_each,
            block_ids=block_ids,
            lengths=np.full(num_sequences, length, dtype=np.int32),
        )
        heads = self._shape.num_query_heads + 2 * self._shape.num_kv_heads
        qkv_TCD = self._random(batch.num_rows, heads, self._shape.head_dim)
        q_THD, k_TKD, v_TKD = split_qkv(qkv_TCD, self._shape)
        out_THD = self._random(batch.num_rows, self._shape.num_query_heads, self._shape.head_dim)
        num_layers = min(len(kv_LN2KPD), MAX_LAYERS)
        planned = []
        self._device.submit(lambda: planned.append(self._device.ops.plan_attention(batch, decode=decode))).wait()

        def work() -> None:
            for layer in range(num_layers):
                planned[0].run(q_THD, k_TKD, v_TKD, kv_LN2KPD[layer], out_THD)

        return self._time_us(work, recorded=True) / num_layers

    def _device_decode(self) -> tuple[float, float]:
        """Fixed cost, and cost of each KV token."""
        num_sequences = min(8, self._config.max_num_seqs)
        room = max(self._config.device_blocks, self._config.staging_blocks) * self._config.block_size
        short, long = 16, max(32, min(2048, self._config.max_model_len, room // num_sequences))
        return _line(
            (num_sequences * short, self._attention_us(num_sequences, 1, short, decode=True)),
            (num_sequences * long, self._attention_us(num_sequences, 1, long, decode=True)),
        )

    def _prefill(self) -> tuple[float, float]:
        """Fixed cost, and cost of each pair of a row and a KV token that it sees."""
        most = min(self._config.max_num_batched_tokens, self._config.max_model_len)
        few, many = 8, max(32, most)
        return _line(
            (few * (few + 1) / 2, self._attention_us(1, few, few, decode=False)),
            (many * (many + 1) / 2, self._attention_us(1, many, many, decode=False)),
        )

    def _host_us(self, num_rows: int, length: int) -> float:
        """One layer's task of the worker pool in a chain of them: within a lap the workers are awake."""
        executor, config = self._executor, self._config
        assert executor.pool is not None
        attention = executor.host_attention(executor.pool)
        blocks_each = config.blocks_for(length)
        heads = self._shape.num_query_heads + 2 * self._shape.num_kv_heads
        qkv_TCD = torch.randn(num_rows, heads, self._shape.head_dim).to(getattr(torch, config.dtype))
        out_THD = torch.zeros(num_rows, self._shape.num_query_heads, self._shape.head_dim, dtype=qkv_TCD.dtype)
        lap = attention.plan(
            np.full(num_rows, length, dtype=np.int32),
            np.arange(num_rows + 1, dtype=np.int32) * blocks_each,
            np.arange(num_rows * blocks_each, dtype=np.int32) % config.host_blocks,
            qkv_address=qkv_TCD.data_ptr(),
            out_address=out_THD.data_ptr(),
        )
        flags = np.zeros(2 * FLAG_WORDS, dtype=np.int32)
        ready, done = flags.ctypes.data, flags.ctypes.data + 4 * FLAG_WORDS
        for turn in range(1, CHAINED + 1):
            layer = turn % self._shape.num_layers
            attention.arm(lap, layer, ready=ready, ready_value=1, done=done, done_value=turn)
        _native.flag_raise(ready, 1)
        if not _native.flag_wait(done, CHAINED, config.host_deadline_s):
            raise HostAttentionError(f"the worker pool did not do {CHAINED} tasks within the deadline")
        _, start_ns, end_ns = lap.timeline()[CHAINED // 2 :].T
        return float(np.median(end_ns - start_ns)) / 1e3

    def _host_attention(self) -> tuple[float, float, float]:
        """Fixed cost of a task, cost of each KV token, cost of each row."""
        if not self._config.host_blocks:
            rough = self._rough
            return rough.host_task_us, rough.host_us_per_token, rough.host_us_per_row
        room_each = self._config.host_blocks * self._config.block_size // 16
        length = max(32, min(2048, self._config.max_model_len, room_each))
        cases = ((1, 1), (16, 1), (16, length))
        # The fastest of each, round after round: on a machine that others use too, a worker may be late for a while.
        rounds = [[self._host_us(*case) for case in cases] for _ in range(REPEATS)]
        alone_us, rows_us, long_us = map(min, zip(*rounds, strict=True))
        return (
            alone_us,
            max(0.0, long_us - rows_us) / (16 * (length - 1)),
            max(0.0, rows_us - alone_us) / 15,
        )

    def _handoff(self) -> tuple[float, float]:
        """Cost of a hand-off, and of each row beyond its first."""
        rough = self._rough
        if not self._config.host_blocks:
            return rough.handoff_us, rough.handoff_us_per_row
        alone_us, num_rows = self._handoff_us(1), min(64, self._config.max_num_seqs)
        if num_rows == 1:
            return alone_us, rough.handoff_us_per_row
        return alone_us, max(0.0, self._handoff_us(num_rows) - alone_us) / (num_rows - 1)

    def _handoff_us(self, num_rows: int) -> float:
        """From attention output of the worker pool to the next q, k, v in it, over the device, in a chain: within a lap
        the workers are awake. One that is late for a while delays some of the chain."""
        config, shape = self._config, self._shape
        handoff = self._executor.handoffs[0]
        rows = tuple(
            Rows(
                str(row), row, Tier.HOST, 0, 1, None, np.array([row % config.host_blocks], dtype=np.int32), (), True, 1
            )
            for row in range(num_rows)
        )
        qkv_TCD = self._random(num_rows, shape.num_query_heads + 2 * shape.num_kv_heads, shape.head_dim)
        attn_THD = self._random(num_rows, shape.num_query_heads, shape.head_dim)
        lap, exchange = handoff.begin(rows), handoff.exchange(qkv_TCD, attn_THD)

        def work() -> None:
            for _ in range(CHAINED):
                handoff.send(exchange)
                exchange.finish()

        times_ns = []
        for _ in range(REPEATS):
            for turn in range(CHAINED):
                handoff.arm(lap, turn % shape.num_layers)
            self._device.submit(work).wait()
            _, start_ns, end_ns = lap.timeline()[-CHAINED:].T
            times_ns.append(np.median(start_ns[1:] - end_ns[:-1]))
        return float(min(times_ns)) / 1e3

    def _launches_us(self) -> dict[str, float]:
        """CPU time to enqueue laps of each kind, as `CostTable` has it.

        The reference device does the work where it enqueues it, so there it costs nothing.
        """
        config, num_steps = self._config, self._shape.num_layers + 1
        names = ("prefill_launch_us", "staged_launch_us", "host_launch_us", "decode_launch_us", "graph_launch_us")
        if config.device != "cuda":
            return dict.fromkeys(names, 0.0)
        launches = {name: getattr(self._rough, name) for name in names}
        if not config.device_blocks:
            return launches
        count = min(DECODES, config.max_num_seqs - 1, config.max_num_batched_tokens - 1)
        decodes, host_decodes = [(Tier.DEVICE, 1)] * max(1, count), [(Tier.HOST, 1)] * max(1, count)
        beside = decodes[:count]
        launches["graph_launch_us"] = self._enqueue_us(*decodes)
        launches["decode_launch_us"] = self._enqueue_us(*decodes, in_parts=True) / num_steps
        launches["prefill_launch_us"] = self._enqueue_us(*beside, (Tier.DEVICE, 0)) / num_steps
        if config.host_blocks:
            staged_us = self._enqueue_us(*beside, (Tier.HOST, 0)) / num_steps
            launches["staged_launch_us"] = max(0.0, staged_us - launches["prefill_launch_us"])
            launches["host_launch_us"] = self._enqueue_us(*host_decodes) / num_steps
        return launches

    def _enqueue_us(self, *rows: tuple[Tier, int], in_parts: bool = False) -> float:
        """CPU time to launch a lap, as one iteration or as two.

        rows: of each its tier and its position, 0 for a prompt of one token, 1 for the decode after it. An iteration of
        a part of a lap goes layer by layer, as beside another lap.
        """
        names = [f"calibration-{slot}" for slot in range(len(rows))]
        for name in names:
            self._executor.add(Request(name, (0,), SamplingParams(temperature=0, max_tokens=2), (), 0.0))
        num_steps = self._shape.num_layers + 1
        starts, stops = ((0, num_steps - 1), (num_steps - 1, num_steps)) if in_parts else ((0,), (num_steps,))
        prompts = [(tier, 0) for tier, _ in rows]
        times = []
        for turn in range(REPEATS + 1):
            sub_batch = _lap(turn, names, rows if turn else prompts)  # every sequence begins with its prompt
            start_s = time.perf_counter()
            launched = [
                self._executor.launch(
                    IterationPlan(
                        iteration=turn,
                        begins=(sub_batch,) if start == 0 else (),
                        spans=(Span(0, start, stop, bool(sub_batch.host_decode)),),
                        ends=(sub_batch,) if stop == num_steps else (),
                        migrations=(),
                        predicted_us=0.0,
                    )
                )
                for start, stop in zip(starts, stops, strict=True)
            ]
            times.append((time.perf_counter() - start_s) * 1e6)
            for iteration in launched:
                self._executor.collect(iteration)
        for name in names:
            self._executor.remove(name)
        return statistics.median(times[1:])

    def _migration_us_per_token(self) -> float:
        config, store = self._config, self._executor.store
        num_blocks = min(64, config.host_blocks, config.device_blocks)
        if num_blocks == 0:
            return self._rough.migration_us_per_token
        ids = self._made(lambda: torch.arange(num_blocks, device=self._device.torch_device))
        copies = self._device.ops.block_copies(store.device_LN2KPD, ids, store.host_LNX, ids, to_host=True)
        num_tokens = num_blocks * config.block_size
        return self._time_us(lambda: copies.run(0, 0, store.num_layers)) / num_tokens


def _lap(number: int, names: Sequence[str], rows: Sequence[tuple[Tier, int]]) -> SubBatch:
    """A lap of sub-batch 0 with a row for each name, all with the first block of their pool."""
    made = [_row(slot, name, *row) for slot, (name, row) in enumerate(zip(names, rows, strict=True))]
    decodes = [row for row in made if not row.is_prefill]
    return SubBatch(
        index=0,
        lap=number,
        prefill=tuple(row for row in made if row.is_prefill),
        device_decode=tuple(row for row in decodes if row.tier is Tier.DEVICE),
        host_decode=tuple(row for row in decodes if row.tier is Tier.HOST),
    )


def _row(slot: int, name: str, tier: Tier, start: int) -> Rows:
    staging = (0,) if tier is Tier.HOST and start == 0 else ()
    return Rows(
        name, slot, tier, start, 1, None if start else (0,), np.zeros(1, dtype=np.int32), staging,
        samples=True, num_generated=start,
    )  # fmt: skip


def _curve(time_us: Callable[[int], float], sizes: Iterable[int], most: int, *, may_fall: bool = False) -> Curve:
    """`time_us` at `most` and at the sizes below, the largest first.

    may_fall: fewer may take longer than more, as products of matrices on a GPU do, whose tiles fit some numbers of rows
    better than others. Else that was something else on the machine, and they count as taking as long.
    """
    below = sorted((size for size in sizes if size < most), reverse=True)
    descending = [most, *below]
    times_us = map(time_us, descending)
    return Curve(tuple(zip(descending, times_us if may_fall else accumulate(times_us, min), strict=True))[::-1])


def _line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Intercept and slope of the line through two points, neither below zero."""
    (x0, y0), (x1, y1) = first, second
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return max(0.0, y0 - slope * x0), slope
