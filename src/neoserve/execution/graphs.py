"""Recorded work: what would be enqueued kernel by kernel, at some 10 us of Python each, is enqueued as one.

All are for fixed numbers of rows, the *buckets*; rows that fill a bucket up compute nothing that anyone reads. A lap
over L layers has L + 1 steps: step i is POST(i - 1) and PRE(i), the first begins with the embedding, the last is only
POST(L - 1). Three kinds of recordings:

- a lap of nothing but device decodes, which runs alone: all of its steps, with their attention, in one;
- such a lap beside another one: each step with its attention, if layers are short;
- any other lap: each step without its attention, which is enqueued between the steps. Those of long layers are many
  and fill a GPU's memory, which has little left beside such layers, and the GPU is busy with each for longer than it
  takes to enqueue kernel by kernel, so that is how they are replayed.

Shape letters: T rows, B sequences, S slots, C = H + 2K heads of a fused qkv row, H query heads, K kv heads, D head dim,
E model dim.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from neoserve.core.config import DTYPE_BYTES, ModelShape, ResolvedConfig
from neoserve.device.base import DecodePlans, Device, PagedBatch
from neoserve.execution.kv_store import KVStore
from neoserve.execution.linear import AttentionRows, Linear
from neoserve.kernels.paged_arrays import pad_decode
from neoserve.models.decoder import Decoder, split_qkv

logger = logging.getLogger(__name__)

LAP_BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128)
STAGE_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
MORE_STAGE_BUCKETS = (320, 384, 432, 512, 640, 768)
"""For short layers. Rows beyond the largest keep a GPU busy for longer than it takes to enqueue them by kernel."""
MAX_RECORD_S = 25.0
MAX_RECORD_BYTES = 2**31
_SHORT_LAYER_SHARE = 128
"""A short layer takes a GPU less time than it takes to enqueue it: its weights are at most one part in so many of the
GPU's memory, all of which the GPUs of one time read in much the same time, 25 to 50 ms."""

Replay = Callable[[], None]
Attend = Callable[[int, torch.Tensor], None]
"""What becomes of a layer's `qkv_TCD`."""


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
    """`Linear` by recordings of a lap's steps.

    POST(i - 1) and PRE(i) stand side by side in every program, so `post` leaves its work to the `pre` that follows;
    only the last one replays its own.

    buckets: the steps of each; `steps` are those of the one that holds the rows.
    """

    stays: ClassVar[bool] = True

    def __init__(
        self, rows: Rows, steps: Sequence[Replay], buckets: Mapping[int, Sequence[Replay]], shape: ModelShape
    ) -> None:
        self._rows = rows
        self._steps = steps
        self._buckets = buckets
        self._shape = shape
        self._attention_rows: dict[tuple[int, int], AttentionRows] = {}
        self.x_TE = rows.x_TE
        self.qkv_TCD, self.attn_THD = rows.qkv_TCD, rows.attn_THD

    def embed(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        self._rows.token_ids_T.copy_(token_ids_T)
        self._rows.positions_T.copy_(positions_T)

    def pre(self, layer: int) -> None:
        self._steps[layer]()

    def attention_rows(self, rows: slice) -> AttentionRows:
        key = (rows.start, rows.stop)
        if key not in self._attention_rows:
            self._attention_rows[key] = AttentionRows.of(self.qkv_TCD, self.attn_THD, rows, self._shape)
        return self._attention_rows[key]

    def post(self, layer: int, row_ids_B: torch.Tensor | None = None) -> None:
        if layer < len(self._steps) - 2:
            return
        if row_ids_B is None:
            self._steps[-1]()
            return
        num_rows = len(row_ids_B)
        for tensor in (self.attn_THD, self._rows.residual_TE):
            tensor[:num_rows].copy_(tensor.index_select(0, row_ids_B))
        self._buckets[min(size for size in self._buckets if size >= num_rows)][-1]()


class StageGraphs:
    """The recordings of one sub-batch's linear work: a step of a lap, for each bucket of rows.

    one_by_one: as `Device.record` has it.
    """

    def __init__(
        self, device: Device, model: Decoder, dtype: torch.dtype, sizes: Sequence[int], *, one_by_one: bool
    ) -> None:
        self.sizes = tuple(sizes)
        self._one_by_one = one_by_one
        self._device = device
        self._model = model
        self._rows = Rows.allocate(model, self.sizes[-1], dtype, device.torch_device)
        self._steps: dict[int, tuple[Replay, ...]] = {}

    def record(self, size: int) -> None:
        """On the stream: record every step for `size` rows."""
        rows = self._rows.first(size)

        def keep(_: int, qkv_TCD: torch.Tensor) -> None:
            rows.qkv_TCD.copy_(qkv_TCD)

        steps = _steps(self._model, rows, keep)
        for step in (0, 1, -1):  # each kernel runs once before it is recorded; the layers' are the same
            steps[step]()
        self._steps[size] = tuple(self._device.record(step, shared=True, one_by_one=self._one_by_one) for step in steps)

    @property
    def recorded_sizes(self) -> set[int]:
        """The buckets that are recorded."""
        return set(self._steps)

    def linear(self, num_rows: int) -> Linear | None:
        """For a lap of `num_rows` rows; `None` when no recorded bucket holds them."""
        size = _bucket(self._steps, num_rows)
        if size is None:
            return None
        return RecordedLinear(self._rows.first(num_rows), self._steps[size], self._steps, self._model.shape)


class LapGraphs:
    """Recordings of laps of device decodes, up to the HEAD, for each bucket of sequences: as a whole, and in steps.

    One such lap is in flight at a time: all have the same rows and plans.
    """

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
        self._steps: dict[int, tuple[Replay, ...]] = {}

    def record(self, size: int) -> None:
        """On the stream: record the lap of `size` sequences as a whole."""
        self._plans.plan(pad_decode(_NO_SEQUENCES, size, self._store.padding_block))
        steps = self._work(size)

        def work() -> None:
            for step in steps:
                step()

        work()  # each kernel runs once before it is recorded
        self._laps[size] = self._device.record(work, shared=True)

    def record_steps(self, size: int) -> None:
        """On the stream: record each step of the lap of `size` sequences, which `record` has recorded before."""
        self._steps[size] = tuple(self._device.record(step, shared=True) for step in self._work(size))

    def holds(self, num_sequences: int) -> bool:
        """Whether a recorded bucket holds a lap of so many sequences."""
        return _bucket(self._laps, num_sequences) is not None

    def replay(self, batch: PagedBatch, slots_B: torch.Tensor, positions_B: torch.Tensor) -> Linear:
        """Enqueue the lap of a decode batch whose sequences have `slots_B`; what it leaves for the HEAD."""
        size = _bucket(self._laps, batch.num_sequences)
        assert size is not None, "ask `holds` first"
        self._bring(batch, size, slots_B, positions_B)
        self._laps[size]()
        return RecordedLinear(self._rows.first(batch.num_sequences), (), {}, self._model.shape)

    def steps(self, batch: PagedBatch, slots_B: torch.Tensor, positions_B: torch.Tensor) -> Linear | None:
        """Begin the lap of such a batch in steps, each with its EMBED or POST, its PRE and its ATTEND; `None` if no
        recorded bucket holds it."""
        size = _bucket(self._steps, batch.num_sequences)
        if size is None:
            return None
        self._bring(batch, size, slots_B, positions_B)
        rows = self._rows.first(batch.num_sequences)
        return RecordedLinear(rows, self._steps[size], self._steps, self._model.shape)

    def _bring(self, batch: PagedBatch, size: int, slots_B: torch.Tensor, positions_B: torch.Tensor) -> None:
        self._slots_B[: batch.num_sequences].copy_(slots_B)
        self._rows.positions_T[: batch.num_sequences].copy_(positions_B)
        self._plans.plan(pad_decode(batch, size, self._store.padding_block))

    def _work(self, size: int) -> list[Replay]:
        """The steps of a lap, to be recorded."""
        store, shape, rows = self._store, self._model.shape, self._rows.first(size)
        attention = self._plans.bucket(size)

        def attend(layer: int, qkv_TCD: torch.Tensor) -> None:
            attention.run(*split_qkv(qkv_TCD, shape), store.device_LN2KPD[layer], rows.attn_THD)

        embed, *others = _steps(self._model, rows, attend)

        def first() -> None:
            rows.token_ids_T.copy_(self._last_ids_S[self._slots_B[:size]])
            embed()

        return [first, *others]


def _steps(model: Decoder, rows: Rows, attend: Attend) -> list[Replay]:
    """The steps of a lap of `rows`, to be recorded; `attend` is called with what each PRE has made."""
    return [partial(_step, model, step, rows, attend) for step in range(model.shape.num_layers + 1)]


def _step(model: Decoder, step: int, rows: Rows, attend: Attend) -> None:
    layers = model.layers
    if step == 0:
        x_TE = model.embed(rows.token_ids_T)
        qkv_TCD, residual_TE = layers[0].before_attention(x_TE, None, rows.positions_T)
    else:
        x_TE, residual_TE = layers[step - 1].after_attention(rows.attn_THD, rows.residual_TE)
        if step == len(layers):
            rows.x_TE.copy_(x_TE)
            return
        qkv_TCD, residual_TE = layers[step].before_attention(x_TE, residual_TE, rows.positions_T)
    _keep(rows.residual_TE, residual_TE)
    attend(step, qkv_TCD)


class Graphs:
    """All recordings of an engine. Before `record`, and for what no bucket holds, there are none."""

    def __init__(
        self, device: Device, model: Decoder, store: KVStore, last_ids_S: torch.Tensor, config: ResolvedConfig
    ) -> None:
        self._device = device
        dtype: torch.dtype = getattr(torch, config.dtype)
        self._lap: LapGraphs | None = None
        self._stages: tuple[StageGraphs, ...] = ()
        layer_bytes = config.shape.layer_parameters * DTYPE_BYTES[config.dtype]
        is_short = layer_bytes * _SHORT_LAYER_SHARE <= device.total_bytes()
        self._cuts_laps = bool(config.host_blocks) and is_short
        if config.enforce_eager:
            return
        if config.device_blocks:
            sizes = _up_to(LAP_BUCKETS, min(config.max_num_seqs, config.device_blocks))
            rows = Rows.allocate(model, sizes[-1], dtype, device.torch_device)
            plans = device.ops.decode_plans(sizes, config.device_blocks, store.padding_block)
            self._lap = LapGraphs(device, model, store, last_ids_S, rows, plans)
        buckets = STAGE_BUCKETS + MORE_STAGE_BUCKETS if is_short else STAGE_BUCKETS
        sizes = _up_to(buckets, config.max_num_batched_tokens)
        num_sub_batches = 2 if config.host_blocks else 1
        self._stages = tuple(
            StageGraphs(device, model, dtype, sizes, one_by_one=not is_short) for _ in range(num_sub_batches)
        )

    def record(self) -> Recorded | None:
        """Record what time and memory allow, largest buckets first; `None` where there is nothing to record."""
        sets = [(graphs.record, graphs.sizes) for graphs in (self._lap, *self._stages) if graphs is not None]
        if self._lap is not None and self._cuts_laps:
            sets.append((self._lap.record_steps, self._lap.sizes))
        work = [partial(record, size) for record, sizes in sets for size in reversed(sizes)]
        if not work:
            return None
        start_s, free_bytes, num_recorded = time.perf_counter(), self._device.free_bytes(), 0
        for record in work:
            self._device.submit(record).wait()
            num_recorded += 1
            seconds, num_bytes = time.perf_counter() - start_s, free_bytes - self._device.free_bytes()
            if seconds > MAX_RECORD_S or num_bytes > MAX_RECORD_BYTES:
                logger.warning(
                    "recorded %d of %d sets of graphs, the time or the memory for more is up", num_recorded, len(work)
                )
                break
        return Recorded(num_recorded, seconds, num_bytes)

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Growing numbers of rows for which the linear work of every sub-batch's laps is recorded."""
        recorded = [stages.recorded_sizes for stages in self._stages]
        return tuple(sorted(set.intersection(*recorded))) if recorded else ()

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


def _bucket(sizes: Iterable[int], count: int) -> int | None:
    """The smallest of `sizes` that is at least `count`."""
    return min((size for size in sizes if size >= count), default=None)


def _keep(target: torch.Tensor, result: torch.Tensor) -> None:
    """Bring a result to its place, unless it was made there."""
    if result.data_ptr() != target.data_ptr():
        target.copy_(result)
