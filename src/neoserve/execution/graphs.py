"""Recorded work: what would be enqueued kernel by kernel, at some 10 us of Python each, is enqueued as one.

Two kinds of recordings, both for fixed numbers of rows, the *buckets*; rows that fill a bucket up compute nothing that
anyone reads. A whole lap of device decodes, all but its HEAD, is one recording. In every other program attention is
enqueued between the layers, and each lap's linear work between two attentions, POST(l) and PRE(l + 1), is one.

Shape letters: T rows, B sequences, S slots, C = H + 2K heads of a fused qkv row, H query heads, K kv heads, D head dim,
E model dim.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from neoserve.core.config import ResolvedConfig
from neoserve.device.base import DecodePlans, Device, PagedBatch
from neoserve.execution.kv_store import KVStore
from neoserve.execution.linear import EagerLinear, Linear
from neoserve.kernels.paged_arrays import pad_decode
from neoserve.models.decoder import Decoder, split_qkv

logger = logging.getLogger(__name__)

LAP_BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128)
STAGE_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
"""Rows beyond the largest keep a GPU busy for longer than it takes to enqueue them kernel by kernel."""
MAX_RECORD_S = 25.0
MAX_RECORD_BYTES = 2**31

Replay = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded, and the device's memory that it took."""

    num_sets: int
    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        return f"recorded {self.num_sets} sets of graphs in {self.seconds:.1f} s, {self.num_bytes / 2**20:.0f} MiB"


@dataclass(frozen=True, slots=True)
class Rows:
    """Tensors that stay where they are, for the rows of one lap at a time."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    x_TE: torch.Tensor
    residual_TE: torch.Tensor
    qkv_TCD: torch.Tensor
    attn_THD: torch.Tensor

    @classmethod
    def allocate(cls, model: Decoder, num_rows: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """For up to `num_rows` rows. All values are valid ones from the start, as a bucket's spare rows read them."""
        shape = model.shape

        def zeros(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros((num_rows, *size), dtype=kind, device=device)

        return cls(
            token_ids_T=zeros(kind=torch.int64),
            positions_T=zeros(kind=torch.int64),
            x_TE=zeros(shape.hidden_size),
            residual_TE=zeros(shape.hidden_size),
            qkv_TCD=zeros(shape.num_query_heads + 2 * shape.num_kv_heads, shape.head_dim),
            attn_THD=zeros(shape.num_query_heads, shape.head_dim),
        )

    def first(self, num_rows: int) -> Rows:
        """The first `num_rows` rows."""
        tensors = (self.token_ids_T, self.positions_T, self.x_TE, self.residual_TE, self.qkv_TCD, self.attn_THD)
        return Rows(*(tensor[:num_rows] for tensor in tensors))


class RecordedLinear:
    """`Linear` by recordings.

    Step i of a lap over L layers is POST(i - 1) and PRE(i), which stand side by side in every program; step 0 begins
    with the embedding. So `post` leaves its work to the `pre` that follows; only the last one replays its own.
    """

    def __init__(self, rows: Rows, steps: Sequence[Replay]) -> None:
        self._rows = rows
        self._steps = steps
        self.x_TE = rows.x_TE
        self.qkv_TCD, self.attn_THD = rows.qkv_TCD, rows.attn_THD

    def embed(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        self._rows.token_ids_T.copy_(token_ids_T)
        self._rows.positions_T.copy_(positions_T)

    def pre(self, layer: int) -> None:
        self._steps[layer]()

    def post(self, layer: int) -> None:
        if layer == len(self._steps) - 2:
            self._steps[layer + 1]()


class StageGraphs:
    """The recordings of one sub-batch's linear work: a step of a lap, for each bucket of rows."""

    def __init__(self, device: Device, model: Decoder, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._device = device
        self._model = model
        self._rows = Rows.allocate(model, self.sizes[-1], dtype, device.torch_device)
        self._steps: dict[int, tuple[Replay, ...]] = {}

    def record(self, size: int) -> None:
        """On the stream: record every step for `size` rows."""
        rows = self._rows.first(size)
        num_layers = self._model.shape.num_layers

        def work(step: int) -> Replay:
            return lambda: self._step(step, rows)

        for step in (0, 1, num_layers):  # each kernel runs once before it is recorded; the layers' are the same
            self._step(step, rows)
        self._steps[size] = tuple(self._device.record(work(step), shared=True) for step in range(num_layers + 1))

    def linear(self, num_rows: int) -> Linear | None:
        """For a lap of `num_rows` rows; `None` when no recorded bucket holds them."""
        size = _bucket(sorted(self._steps), num_rows)
        return RecordedLinear(self._rows.first(num_rows), self._steps[size]) if size is not None else None

    def _step(self, step: int, rows: Rows) -> None:
        layers = self._model.layers
        if step == 0:
            x_TE = self._model.embed(rows.token_ids_T)
            qkv_TCD, residual_TE = layers[0].before_attention(x_TE, None, rows.positions_T)
        else:
            x_TE, residual_TE = layers[step - 1].after_attention(rows.attn_THD, rows.residual_TE)
            if step == len(layers):
                rows.x_TE.copy_(x_TE)
                _keep(rows.residual_TE, residual_TE)
                return
            qkv_TCD, residual_TE = layers[step].before_attention(x_TE, residual_TE, rows.positions_T)
        rows.qkv_TCD.copy_(qkv_TCD)
        _keep(rows.residual_TE, residual_TE)


class LapGraphs:
    """Recordings of whole laps of device decodes, up to the HEAD, for each bucket of sequences."""

    def __init__(
        self, device: Device, model: Decoder, store: KVStore, last_ids_S: torch.Tensor, rows: Rows, plans: DecodePlans
    ) -> None:
        self.sizes = plans.sizes
        self._device = device
        self._model = model
        self._store = store
        self._last_ids_S = last_ids_S
        self._rows = rows
        self._slots_B = torch.zeros_like(rows.positions_T)
        self._plans = plans
        self._laps: dict[int, Replay] = {}

    def record(self, size: int) -> None:
        """On the stream: record the lap of `size` sequences."""
        self._plans.plan(pad_decode(_NO_SEQUENCES, size, self._store.padding_block))

        def work() -> None:
            self._lap(size)

        work()  # each kernel runs once before it is recorded
        self._laps[size] = self._device.record(work, shared=True)

    def holds(self, num_sequences: int) -> bool:
        """Whether a recorded bucket holds a lap of so many sequences."""
        return _bucket(sorted(self._laps), num_sequences) is not None

    def replay(self, batch: PagedBatch, slots_B: torch.Tensor, positions_B: torch.Tensor) -> Linear:
        """Enqueue the lap of a decode batch whose sequences have `slots_B`; what it leaves for the HEAD."""
        num_sequences = batch.num_sequences
        size = _bucket(sorted(self._laps), num_sequences)
        assert size is not None, "ask `holds` first"
        self._slots_B[:num_sequences].copy_(slots_B)
        self._rows.positions_T[:num_sequences].copy_(positions_B)
        self._plans.plan(pad_decode(batch, size, self._store.padding_block))
        self._laps[size]()
        return RecordedLinear(self._rows.first(num_sequences), ())

    def _lap(self, size: int) -> None:
        rows, shape = self._rows.first(size), self._model.shape
        attention = self._plans.bucket(size)
        linear = EagerLinear(self._model)
        linear.embed(self._last_ids_S[self._slots_B[:size]], rows.positions_T)
        for layer in range(shape.num_layers):
            linear.pre(layer)
            q_THD, k_TKD, v_TKD = split_qkv(linear.qkv_TCD, shape)
            kv_N2KPD = self._store.device_LN2KPD[layer]
            attention.run(q_THD, k_TKD, v_TKD, kv_N2KPD, linear.attn_THD)
            linear.post(layer)
        rows.x_TE.copy_(linear.x_TE)


class Graphs:
    """All recordings of an engine. Before `record`, and for what no bucket holds, there are none."""

    def __init__(
        self, device: Device, model: Decoder, store: KVStore, last_ids_S: torch.Tensor, config: ResolvedConfig
    ) -> None:
        self._device = device
        dtype: torch.dtype = getattr(torch, config.dtype)
        self._lap: LapGraphs | None = None
        self._stages: tuple[StageGraphs, ...] = ()
        if config.enforce_eager:
            return
        if config.device_blocks:
            sizes = _up_to(LAP_BUCKETS, min(config.max_num_seqs, config.device_blocks))
            rows = Rows.allocate(model, sizes[-1], dtype, device.torch_device)
            plans = device.ops.decode_plans(sizes, config.device_blocks, store.padding_block)
            self._lap = LapGraphs(device, model, store, last_ids_S, rows, plans)
        if config.host_blocks:
            sizes = _up_to(STAGE_BUCKETS, config.max_num_batched_tokens)
            self._stages = tuple(StageGraphs(device, model, dtype, sizes) for _ in range(2))

    def record(self) -> Recorded | None:
        """Record what time and memory allow, largest buckets first; `None` where there is nothing to record."""
        sets = [graphs for graphs in (self._lap, *self._stages) if graphs is not None]
        work = [(graphs, size) for graphs in sets for size in reversed(graphs.sizes)]
        if not work:
            return None
        start_s, free_bytes, num_recorded = time.perf_counter(), self._device.free_bytes(), 0
        for graphs, size in work:
            self._device.submit(partial(graphs.record, size)).wait()
            num_recorded += 1
            seconds, num_bytes = time.perf_counter() - start_s, free_bytes - self._device.free_bytes()
            if seconds > MAX_RECORD_S or num_bytes > MAX_RECORD_BYTES:
                logger.warning(
                    "recorded %d of %d sets of graphs, the time or the memory for more is up", num_recorded, len(work)
                )
                break
        return Recorded(num_recorded, seconds, num_bytes)

    def linear(self, sub_batch: int, num_rows: int) -> Linear | None:
        """The recorded linear work of a sub-batch's lap; `None` where it must be enqueued kernel by kernel."""
        return self._stages[sub_batch].linear(num_rows) if self._stages else None

    def lap(self, num_sequences: int) -> LapGraphs | None:
        """The recording of a whole lap of so many device decodes, if there is one."""
        return self._lap if self._lap is not None and self._lap.holds(num_sequences) else None


def measure_recordings(device: Device, model: Decoder, config: ResolvedConfig) -> int:
    """Memory of the device that all recordings of `config` take with their tensors; they end with this call.

    They run over a pool of a single block: what they take does not depend on its size, which is found by it.
    """
    device.synchronise()
    free_bytes = device.free_bytes()
    store = KVStore(replace(config, device_blocks=0, host_blocks=0, staging_blocks=0), device)
    last_ids_S = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device.torch_device)
    graphs = Graphs(device, model, store, last_ids_S, config)
    device.synchronise()
    graphs.record()
    return free_bytes - device.free_bytes()


_NO_SEQUENCES = PagedBatch(*(np.zeros(size, dtype=np.int32) for size in (1, 1, 0, 0)))


def _up_to(buckets: Sequence[int], most: int) -> tuple[int, ...]:
    """The buckets below `most`, and the one that holds it, if any."""
    return tuple(size for index, size in enumerate(buckets) if index == 0 or buckets[index - 1] < most)


def _bucket(sizes: Sequence[int], count: int) -> int | None:
    """The smallest of the growing `sizes` that is at least `count`."""
    index = bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else None


def _keep(target: torch.Tensor, result: torch.Tensor) -> None:
    """Bring a result to its place, unless it was made there."""
    if result.data_ptr() != target.data_ptr():
        target.copy_(result)
