"""Paged attention on the GPU: FlashInfer's wrappers, planned once a lap and run once a layer.

Planning is host work plus copies on the current stream; it never waits for the GPU. FlashInfer stages each plan in
pinned memory of the wrapper, so a wrapper is planned again only once the copy of its last plan is done.

Shape letters: T rows, H query heads, K kv heads, D head dim, N blocks, P tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.flashinfer_setup import flashinfer, is_sm90a_supported
from neoserve.kernels.paged_arrays import PagedArrays, bucket_size, buffer_size, fill, pad_decode, views

_LAYOUT = "HND"
_CUDA_CORE_GROUPS = (1, 2, 3)
"""GQA groups that decode without tensor cores: they fill too little of a matrix tile."""
_LARGEST_BUCKET = 128
"""Sequences of the largest decode graph; what the workspace must hold partial results for."""
_PREFILL_TILE = 128
_ALIGNMENT_BYTES = 256
_INT_WORKSPACE_BYTES = 2**20
"""Of one set of buckets, and of a plan of few rows: a few arrays of an int32 for each thread block."""


@dataclass(frozen=True, slots=True)
class PagedGeometry:
    """What all plans of a model share."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def tensor_core_decode(self) -> bool:
        """Whether decode runs on tensor cores; every GQA group size can, only some can without."""
        return self.num_query_heads // self.num_kv_heads not in _CUDA_CORE_GROUPS

    def workspace(self, device: torch.device, *, decode: bool) -> torch.Tensor:
        """Memory for the partial results of split sequences, shared by all plans: their runs are in one stream.

        decode: whether decodes are among them; FlashAttention 3 splits no prompt.

        FlashInfer splits work into at most two thread blocks a multiprocessor, except that a captured decode counts
        as many tiles as its rows could take, whatever sequences they belong to; each has fp32 results and a
        log-sum-exp for a tile of rows.
        """
        if not decode and prefill_backend(device) == "fa3":
            return torch.zeros(_ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
        properties = torch.cuda.get_device_properties(device)
        blocks = -(-2 * properties.multi_processor_count // self.num_kv_heads)
        group = self.num_query_heads // self.num_kv_heads
        decode_tile = 16 if group <= 16 and properties.major >= 8 else 64
        captured = -(-_LARGEST_BUCKET * group // decode_tile) + _LARGEST_BUCKET - 1
        rows = max(blocks * _PREFILL_TILE, captured * decode_tile)
        num_bytes = 4 * rows * self.num_query_heads * (self.head_dim + 1) + 2**20
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def plan_bytes(self, batch: PagedBatch) -> int:
        """More than a plan's arrays take: seven int32 for each query head's tile of a sequence's rows, or for each tile
        of rows and heads together."""
        tiles = batch.num_rows // _PREFILL_TILE + batch.num_sequences + 1
        group = self.num_query_heads // self.num_kv_heads
        return 32 * self.num_query_heads * tiles + 8 * batch.num_rows * (group + 1) + _INT_WORKSPACE_BYTES // 4


def prefill_backend(device: torch.device) -> Literal["fa2", "fa3"]:
    """Which of FlashInfer's prefill kernels the GPU runs."""
    return "fa3" if is_sm90a_supported(device) else "fa2"


class Planner:
    """One of FlashInfer's wrappers, planned for one batch after another."""

    def __init__(self, geometry: PagedGeometry, workspace: torch.Tensor, *, decode: bool) -> None:
        self._geometry = geometry
        self._device = workspace.device
        self._decode = decode
        self._workspace = workspace
        self._plan_bytes = 0
        self._copied = torch.cuda.Event()
        self.wrapper: Any
        if decode:
            self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, _LAYOUT, use_tensor_cores=geometry.tensor_core_decode
            )
        else:
            backend = prefill_backend(self._device)
            self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, _LAYOUT, backend=backend)

    def plan(self, batch: PagedBatch) -> PagedArrays:
        """Plan the wrapper; returns the batch's arrays on the device."""
        self._copied.synchronize()
        self._make_room(self._geometry.plan_bytes(batch))
        sizes = (batch.num_sequences, batch.num_rows, len(batch.block_ids))
        pinned = torch.empty(buffer_size(*sizes), dtype=torch.int32, pin_memory=True)
        host = views(pinned, *sizes)
        fill(host, batch, self._geometry.block_size)
        device = views(pinned.to(self._device, non_blocking=True), *sizes)
        geometry = self._geometry
        heads = (geometry.num_query_heads, geometry.num_kv_heads, geometry.head_dim, geometry.block_size)
        dtypes = {"q_data_type": geometry.dtype, "kv_data_type": geometry.dtype}
        paged = (host.block_start, device.block_ids, host.last_block_tokens)
        if self._decode:
            self.wrapper.plan(*paged, *heads, seq_lens=host.lengths, **dtypes)
        else:
            longest = int(np.diff(batch.row_start).max())
            self.wrapper.plan(
                host.row_start,
                *paged,
                *heads,
                causal=True,
                seq_lens=host.lengths,
                max_token_per_sequence=longest,
                **dtypes,
            )
        self._copied.record()
        return device

    def _make_room(self, num_bytes: int) -> None:
        """In place of the 8 MiB that FlashInfer takes for each wrapper's plan."""
        if num_bytes > self._plan_bytes:
            self._plan_bytes = max(_INT_WORKSPACE_BYTES, 1 << (num_bytes - 1).bit_length())
            buffer = torch.empty(self._plan_bytes, dtype=torch.uint8, device=self._device)
            self.wrapper.reset_workspace_buffer(self._workspace, buffer)


class PlannedAttention:
    """A planned batch: `kernels.base.PagedAttention`."""

    def __init__(self, planner: Planner, arrays: PagedArrays) -> None:
        self._planner = planner
        self._arrays = arrays

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        _append(self._arrays, k_TKD, v_TKD, kv_N2KPD)
        self._planner.wrapper.run(q_THD, kv_N2KPD, out=out_THD)


class DecodeBuckets:
    """`kernels.base.DecodePlans`: addresses and launch shapes never change, so that a CUDA graph can hold the runs.

    One bucket for each number of sequences. All buckets lie in the same buffers: a plan overwrites the last one, in
    stream order, so one lap of a set is in flight at a time.
    """

    def __init__(
        self,
        geometry: PagedGeometry,
        workspace: torch.Tensor,
        sizes: tuple[int, ...],
        max_blocks: int,
        padding_block: int,
    ) -> None:
        if not sizes or max(sizes) > _LARGEST_BUCKET:
            raise ValueError(f"bucket sizes {sizes}; expected some, none above {_LARGEST_BUCKET}")
        self.sizes = tuple(sorted(sizes))
        self._padding_block = padding_block
        self._block_size = geometry.block_size
        self._max_blocks = max_blocks + self.sizes[-1]
        largest = buffer_size(self.sizes[-1], self.sizes[-1], self._max_blocks)
        device = workspace.device
        self._pinned = torch.zeros(largest, dtype=torch.int32, pin_memory=True)
        self._buffer = torch.zeros(largest, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event()
        int_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._buckets = {
            size: DecodeBucket(geometry, workspace, int_workspace, views(self._buffer, size, size, self._max_blocks))
            for size in self.sizes
        }

    def bucket(self, num_sequences: int) -> DecodeBucket:
        """The smallest bucket that `num_sequences` fit in; raises ValueError when none does."""
        return self._buckets[bucket_size(self.sizes, num_sequences)]

    def plan(self, batch: PagedBatch) -> DecodeBucket:
        """Plan the bucket that fits, in place, on the current stream."""
        bucket = self.bucket(batch.num_sequences)
        padded = pad_decode(batch, bucket.num_sequences, self._padding_block)
        num_blocks = len(padded.block_ids)
        if num_blocks > self._max_blocks:
            raise ValueError(f"{num_blocks} blocks; the buckets hold {self._max_blocks}")
        sizes = (bucket.num_sequences, bucket.num_sequences, num_blocks)
        self._copied.synchronize()
        used = buffer_size(*sizes)
        host = views(self._pinned, *sizes)
        fill(host, padded, self._block_size)
        self._buffer[:used].copy_(self._pinned[:used], non_blocking=True)
        bucket.plan(host)
        self._copied.record()
        return bucket


class DecodeBucket:
    """The plan for one number of sequences: `kernels.base.PagedAttention` that is planned again in place."""

    def __init__(
        self, geometry: PagedGeometry, workspace: torch.Tensor, int_workspace: torch.Tensor, arrays: PagedArrays
    ) -> None:
        self.num_sequences = len(arrays.lengths)
        self._geometry = geometry
        self._arrays = arrays
        self._is_planned = False
        self._wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=geometry.tensor_core_decode,
            paged_kv_indptr_buffer=arrays.block_start,
            paged_kv_indices_buffer=arrays.block_ids,
            paged_kv_last_page_len_buffer=arrays.last_block_tokens,
        )
        self._wrapper.reset_workspace_buffer(workspace, int_workspace)

    def plan(self, host: PagedArrays) -> None:
        """Plan for pinned arrays of exactly `num_sequences` sequences that are on their way to the bucket's own.

        The first plan loads the kernels; later ones, by FlashInfer's shorter way, only compute the split.
        """
        geometry = self._geometry
        arguments = (
            host.block_start,
            self._arrays.block_ids[: len(host.block_ids)],
            host.last_block_tokens,
            geometry.num_query_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            geometry.block_size,
        )
        dtypes = {"q_data_type": geometry.dtype, "kv_data_type": geometry.dtype}
        if self._is_planned:
            flashinfer.fast_decode_plan(
                self._wrapper, *arguments, global_override_indptr_cpu=host.block_start, **dtypes
            )
        else:
            self._wrapper.plan(*arguments, **dtypes)
            self._is_planned = True

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        _append(self._arrays, k_TKD, v_TKD, kv_N2KPD)
        self._wrapper.run(q_THD, kv_N2KPD, out=out_THD)


def _append(arrays: PagedArrays, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv_N2KPD: torch.Tensor) -> None:
    flashinfer.append_paged_kv_cache(
        k_TKD,
        v_TKD,
        arrays.row_sequences,
        arrays.row_positions,
        kv_N2KPD,
        arrays.block_ids,
        arrays.block_start,
        arrays.last_block_tokens,
        kv_layout=_LAYOUT,
    )
