"""Measures decode attention on the CPU: time, bandwidth, error, and what torch needs for the same.

Laps are measured as the engine runs them: several layers, each with KV of its own under the same block tables, armed
one behind the other, so that whoever has finished a layer waits for the others and fetches what it reads next.

Shape letters: L layers, B sequences, H query heads, K kv heads, G heads that share one kv head, D head dim, N blocks,
P tokens per block, S tokens of one sequence, X elements of one tile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from neoserve._native import HostMemory, Lap, WorkerPool, flag_raise, flag_wait
from neoserve.core.config import DTYPE_BYTES, DType
from neoserve.core.errors import ConfigError, HostAttentionError
from neoserve.kernels.host_attention import from_host_layout, host_attention

_PASSES = 7  # over all laps, each right after the same threads have streamed the same memory; the median counts
_MOST_LAYERS = 32
_MOST_ARMED = 2048
_TIMEOUT_S = 120.0
_FILL_BYTES = 64 * 2**20
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True)
class HeadShape:
    """The heads of a model."""

    name: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `length` tokens each, attended by one instruction set."""

    heads: HeadShape
    dtype: DType
    block_size: int
    batch: int
    length: int
    instruction_set: str

    @property
    def blocks_per_row(self) -> int:
        """Blocks of one sequence."""
        return -(-self.length // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of K and V of one block."""
        return 2 * self.block_size * self.heads.num_kv_heads * self.heads.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def lap_bytes(self) -> int:
        """Bytes of the blocks of one layer of a lap."""
        return self.batch * self.blocks_per_row * self.block_bytes


@dataclass(frozen=True)
class Measurement:
    """What a layer took, and how much of the read bandwidth it reached.

    The machine may be shared, and its bandwidth drift, so each pass is held against a streaming read just before it.
    All of these are medians over the passes, `ratio` that of the passes' ratios. `error`: norm of the difference from
    float64 over the norm, on some rows and heads.
    """

    case: Case
    ms: float
    gb_per_s: float
    read_gb_per_s: float
    ratio: float
    error: float
    torch_ms: float | None


class AttentionBench:
    """A worker pool and KV memory far larger than the caches, over which cases rotate. Use as a context manager."""

    def __init__(self, cpus: Sequence[int], kv_bytes: int) -> None:
        self._pool = WorkerPool(cpus)
        self._kv_bytes = kv_bytes
        self._memory = HostMemory(kv_bytes, touch_cpus=cpus)
        self._flags = HostMemory(2 * _CACHE_LINE_BYTES)
        self._random = np.random.default_rng(0)
        self._filled: DType | None = None
        self._armed = 0
        flag_raise(self._ready, 1)

    def __enter__(self) -> AttentionBench:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    @property
    def _ready(self) -> int:
        return self._flags.address

    @property
    def _done(self) -> int:
        return self._flags.address + _CACHE_LINE_BYTES

    def fits(self, case: Case) -> bool:
        """Whether the KV of one layer of a lap fits into the memory."""
        return case.lap_bytes <= self._kv_bytes

    def measure(self, case: Case, *, with_torch: bool = False) -> Measurement:
        """One case, its block tables shuffled over the whole memory.

        Raises ConfigError if the case does not fit, HostAttentionError if a worker fails.
        """
        if not self.fits(case):
            raise ConfigError(
                f"{case.batch} sequences of {case.length} tokens take {case.lap_bytes / 2**30:.1f} GiB of KV; "
                f"expected at most {self._kv_bytes / 2**30:.1f} GiB, choose a larger --kv-gib"
            )
        self._fill(case.dtype)
        problem = _Problem(case, self._pool, self._kv(case), self._random)
        laps = problem.plan()
        pass_bytes = sum(lap.kv_bytes for lap in laps) * problem.num_layers
        reads, rates = [], []
        for _ in range(_PASSES):
            reads.append(self._pool.read_bandwidth(self._memory.address, self._kv_bytes, repeats=1))
            rates.append(pass_bytes / self._run(problem, laps) / 1e9)
        gb_per_s = median(rates)
        return Measurement(
            case=case,
            ms=pass_bytes / (len(laps) * problem.num_layers) / gb_per_s / 1e6,
            gb_per_s=gb_per_s,
            read_gb_per_s=median(reads),
            ratio=median(rate / read for rate, read in zip(rates, reads, strict=True)),
            error=problem.error(),
            torch_ms=self._torch_ms(case) if with_torch else None,
        )

    def _fill(self, dtype: DType) -> None:
        """Normally distributed elements everywhere, a pattern repeated."""
        if self._filled == dtype:
            return
        elements = torch.randn(_FILL_BYTES // DTYPE_BYTES[dtype], generator=torch.Generator().manual_seed(0))
        pattern = elements.to(getattr(torch, dtype)).view(torch.uint8).numpy()
        memory = self._memory.array()
        for start in range(0, len(memory), len(pattern)):
            part = memory[start : start + len(pattern)]
            part[:] = pattern[: len(part)]
        self._filled = dtype

    def _kv(self, case: Case) -> torch.Tensor:
        """The memory as layers of host KV, [L, N, K, 2, X]: as many as fit, but no more than models have."""
        num_layers = min(_MOST_LAYERS, self._kv_bytes // case.lap_bytes)
        num_blocks = self._kv_bytes // case.block_bytes // num_layers
        elements = torch.from_numpy(self._memory.array()[: num_layers * num_blocks * case.block_bytes])
        tile = case.block_size * case.heads.head_dim
        return elements.view(getattr(torch, case.dtype)).view(num_layers, num_blocks, case.heads.num_kv_heads, 2, tile)

    def _run(self, problem: _Problem, laps: Sequence[Lap]) -> float:
        """Seconds from the start of the first layer to the end of the last, hand-offs between them included."""
        nanoseconds = 0
        at_once = _MOST_ARMED // problem.num_layers
        for start in range(0, len(laps), at_once):
            armed = laps[start : start + at_once]
            for lap in armed:
                for layer in range(problem.num_layers):
                    self._armed += 1
                    problem.attention.arm(
                        lap, layer, ready=self._ready, ready_value=1, done=self._done, done_value=self._armed
                    )
            if not flag_wait(self._done, self._armed, _TIMEOUT_S) or self._pool.error():
                raise HostAttentionError(self._pool.error() or f"attention took more than {_TIMEOUT_S} s")
            nanoseconds += int(armed[-1].timeline()[-1, 2] - armed[0].timeline()[-problem.num_layers, 1])
        return nanoseconds / 1e9

    def _torch_ms(self, case: Case) -> float:
        """The same by torch on contiguous KV, which it need not gather, with as many threads."""
        heads, dtype = case.heads, getattr(torch, case.dtype)
        shape = (2, case.batch, heads.num_kv_heads, case.length, heads.head_dim)
        one_bytes = torch.Size(shape).numel() * dtype.itemsize
        copies = self._kv_bytes // one_bytes
        kv_2BKSD = torch.from_numpy(self._memory.array()[: copies * one_bytes]).view(dtype).view(copies, *shape)
        q_BH1D = torch.randn(case.batch, heads.num_query_heads, 1, heads.head_dim).to(dtype)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._pool.num_workers)
        times = []
        with torch.inference_mode():
            for k_BKSD, v_BKSD in kv_2BKSD[: max(3, min(copies, 2**30 // one_bytes))]:
                start = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(
                    q_BH1D, k_BKSD, v_BKSD, enable_gqa=heads.num_query_heads != heads.num_kv_heads
                )
                times.append(time.perf_counter() - start)
        torch.set_num_threads(threads)
        return float(np.median(times)) * 1e3


class _Problem:
    """One case over one KV: inputs, block tables that share no block, and the check of the last lap."""

    def __init__(self, case: Case, pool: WorkerPool, kv_LNK2X: torch.Tensor, random: np.random.Generator) -> None:
        heads, dtype = case.heads, getattr(torch, case.dtype)
        self._case = case
        self._kv_LNK2X = kv_LNK2X
        self.num_layers = kv_LNK2X.shape[0]
        self._qkv_BCD = torch.randn(case.batch, heads.num_query_heads + 2 * heads.num_kv_heads, heads.head_dim).to(
            dtype
        )
        self._out_BHD = torch.empty(case.batch, heads.num_query_heads, heads.head_dim, dtype=dtype)
        num_laps = kv_LNK2X.shape[1] // (case.batch * case.blocks_per_row)
        ids = random.permutation(kv_LNK2X.shape[1])[: num_laps * case.batch * case.blocks_per_row]
        self._tables = ids.astype(np.int32).reshape(num_laps, case.batch, case.blocks_per_row)
        self.attention = host_attention(
            pool,
            kv_LNK2X,
            num_query_heads=heads.num_query_heads,
            head_dim=heads.head_dim,
            instruction_set=case.instruction_set,
        )

    def plan(self) -> list[Lap]:
        """One lap for each set of block tables that the memory holds."""
        case = self._case
        lengths = np.full(case.batch, case.length, np.int32)
        block_start = np.arange(case.batch + 1, dtype=np.int32) * np.int32(case.blocks_per_row)
        return [
            self.attention.plan(
                lengths,
                block_start,
                np.ascontiguousarray(table.reshape(-1)),
                qkv_address=self._qkv_BCD.data_ptr(),
                out_address=self._out_BHD.data_ptr(),
            )
            for table in self._tables
        ]

    def error(self) -> float:
        """Of the output of the last lap's last layer against float64, on a few pairs of a row and a kv head."""
        case = self._case
        group = case.heads.num_query_heads // case.heads.num_kv_heads
        difference, norm = 0.0, 0.0
        for i in range(4 if case.length <= 4096 else 1):
            row, kv_head = case.batch - 1 - i % case.batch, i % case.heads.num_kv_heads
            blocks = torch.from_numpy(self._tables[-1, row].astype(np.int64))
            kv_N2KPD = from_host_layout(self._kv_LNK2X[-1, blocks, kv_head : kv_head + 1], case.heads.head_dim)
            k_SD, v_SD = kv_N2KPD[:, :, 0].double().transpose(0, 1).flatten(1, 2)[:, : case.length]
            query_heads = slice(kv_head * group, (kv_head + 1) * group)
            scores_GS = self._qkv_BCD[row, query_heads].double() @ k_SD.T * case.heads.head_dim**-0.5
            expected_GD = scores_GS.softmax(-1) @ v_SD
            difference += float((self._out_BHD[row, query_heads].double() - expected_GD).square().sum())
            norm += float(expected_GD.square().sum())
        return float(np.sqrt(difference / norm))
