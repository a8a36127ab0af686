"""Decode attention over the paged KV, one new row a sequence, which is appended on the way.

Sequences are cut into chunks of about equal size (`decode_plans`), so that programs have equal shares however lengths
differ; a second kernel merges a sequence's chunks, in order.

Shape letters: B sequences, H query heads, K kv heads, G = H / K, D head dim, N blocks, P tokens per block, W chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.decode_plans import DecodeArrays, DecodePlanBuffer
from neoserve.kernels.dependent_launch import follow_predecessor
from neoserve.kernels.launcher import Launcher
from neoserve.kernels.paged_arrays import bucket_size

_TILE = 64
_WARPS = 2
_STAGES = 4
_MERGE_TILE = 16
_SMALLEST_DOT = 16
"""Rows of the smallest matrix product; smaller groups of query heads are filled up."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend_chunks(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    kv_ptr,
    block_ids_ptr,
    block_start_ptr,
    lengths_ptr,
    chunk_sequence_ptr,
    chunk_start_ptr,
    partial_ptr,
    weight_ptr,
    q_row_stride,
    k_row_stride,
    kv_block_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (kv head, chunk): softmax-weighted values [GROUP, D] of a chunk, and their log2 of the sum of weights."""
    follow_predecessor(DEPENDENT)
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    sequence = tl.load(chunk_sequence_ptr + chunk)
    if sequence < 0:
        return
    first_chunk = tl.load(chunk_start_ptr + sequence)
    newest = tl.load(lengths_ptr + sequence) - 1
    chunk_size = tl.cdiv(newest, tl.load(chunk_start_ptr + sequence + 1) - first_chunk)
    start = (chunk - first_chunk) * chunk_size
    stop = tl.minimum(start + chunk_size, newest)
    table = block_ids_ptr + tl.load(block_start_ptr + sequence)
    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, D)
    is_head = g[:, None] < GROUP
    q_rows = q_ptr + sequence * q_row_stride + (head * GROUP + g[:, None]) * D
    q = tl.load(q_rows + d[None, :], mask=is_head, other=0.0)
    top = tl.full((GROUP_TILE,), -float("inf"), dtype=tl.float32)
    weights = tl.zeros((GROUP_TILE,), dtype=tl.float32)
    values = tl.zeros((GROUP_TILE, D), dtype=tl.float32)
    if chunk == first_chunk:  # the first chunk takes the new token, and appends it
        k_new = tl.load(k_ptr + sequence * k_row_stride + head * D + d)
        v_new = tl.load(v_ptr + sequence * k_row_stride + head * D + d)
        slot = kv_ptr + tl.load(table + newest // P).to(tl.int64) * kv_block_stride + (head * P + newest % P) * D + d
        tl.store(slot, k_new)
        tl.store(slot + NUM_KV_HEADS * P * D, v_new)
        top = tl.sum(q.to(tl.float32) * k_new[None, :].to(tl.float32), axis=1) * scale
        weights += 1.0
        values += v_new[None, :].to(tl.float32)
    token = tl.arange(0, TILE)
    head_kv = kv_ptr + head * P * D
    for first in range(start, stop, TILE):
        t = first + token
        inside = t < stop
        block = tl.load(table + t // P, mask=inside, other=0).to(tl.int64)
        k_rows = head_kv + block * kv_block_stride + (t % P) * D
        v_rows = k_rows + NUM_KV_HEADS * P * D
        k = tl.load(k_rows[None, :] + d[:, None], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        v = tl.load(v_rows[:, None] + d[None, :], mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        score = tl.where(inside[None, :], tl.dot(q, k) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weights = weights * shrink + tl.sum(p, axis=1)
        values = tl.dot(p.to(v.dtype), v, values * shrink[:, None])
        top = new_top
    target = (chunk * NUM_KV_HEADS + head) * GROUP + g
    tl.store(partial_ptr + target[:, None] * D + d[None, :], values / weights[:, None], mask=is_head)
    tl.store(weight_ptr + target, top + tl.log2(weights), mask=g < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_chunks(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    weight_ptr,
    chunk_start_ptr,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    follow_predecessor(DEPENDENT)
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    start = tl.load(chunk_start_ptr + sequence)
    stop = tl.load(chunk_start_ptr + sequence + 1)
    d = tl.arange(0, D)
    c = tl.arange(0, TILE)
    top = -float("inf")
    weights = 0.0
    values = tl.zeros((D,), dtype=tl.float32)
    for first in range(start, stop, TILE):
        chunk = first + c
        inside = chunk < stop
        log_weight = tl.load(weight_ptr + chunk * NUM_HEADS + head, mask=inside, other=-float("inf"))
        partial = tl.load(
            partial_ptr + (chunk[:, None] * NUM_HEADS + head) * D + d[None, :], mask=inside[:, None], other=0.0
        )
        new_top = tl.maximum(top, tl.max(log_weight))
        weight = tl.exp2(log_weight - new_top)
        shrink = tl.exp2(top - new_top)
        values = values * shrink + tl.sum(weight[:, None] * partial, axis=0)
        weights = weights * shrink + tl.sum(weight)
        top = new_top
    tl.store(out_ptr + (sequence * NUM_HEADS + head) * D + d, (values / weights).to(out_ptr.dtype.element_ty))


_launch_attend = Launcher(_attend_chunks, num_warps=_WARPS, num_stages=_STAGES)
_launch_merge = Launcher(_merge_chunks, num_warps=1)


class Partials(NamedTuple):
    """Results of chunks, fp32: values [W, H, D], and log2 of the sums of weights [W, H]."""

    values_WHD: torch.Tensor
    weight_WH: torch.Tensor

    @classmethod
    def allocate(cls, num_chunks: int, num_heads: int, head_dim: int, device: torch.device) -> Partials:
        size = (num_chunks, num_heads)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in ((*size, head_dim), size)))


def attend_decode(
    arrays: DecodeArrays,
    q_BHD: torch.Tensor,
    k_BKD: torch.Tensor,
    v_BKD: torch.Tensor,
    kv_N2KPD: torch.Tensor,
    out_BHD: torch.Tensor,
    *,
    dependent: bool,
    partials: Partials | None = None,
) -> None:
    """Append each sequence's k and v at its last token's place, and attend, softmax scale D**-0.5.

    q, k and v may be views of fused rows; their heads must be dense. P and D must be powers of two. partials: memory
    for them, if there is some that stays.
    """
    num_kv_heads, block_size, head_dim = kv_N2KPD.shape[2:]
    num_sequences, num_heads = q_BHD.shape[:2]
    group = num_heads // num_kv_heads
    num_chunks = arrays.chunk_sequence.numel()
    values_WHD, weight_WH = partials or Partials.allocate(num_chunks, num_heads, head_dim, q_BHD.device)
    group_tile = max(_SMALLEST_DOT, triton.next_power_of_2(group))
    _launch_attend(
        (num_kv_heads, num_chunks, 1),
        q_BHD,
        k_BKD,
        v_BKD,
        kv_N2KPD,
        arrays.block_ids,
        arrays.block_start,
        arrays.lengths,
        arrays.chunk_sequence,
        arrays.chunk_start,
        values_WHD,
        weight_WH,
        q_BHD.stride(0),
        k_BKD.stride(0),
        kv_N2KPD.stride(0),
        head_dim**-0.5 / math.log(2),
        constants=(num_kv_heads, group, group_tile, block_size, head_dim, _TILE, dependent),
        launch_pdl=dependent,
    )
    _launch_merge(
        (num_heads, num_sequences, 1),
        out_BHD,
        values_WHD,
        weight_WH,
        arrays.chunk_start,
        constants=(num_heads, head_dim, _MERGE_TILE, dependent),
        launch_pdl=dependent,
    )


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """`kernels.base.PagedAttention` of a decode batch.

    dependent: whether the GPU has dependent launches. partials: memory for them; `None` where each run has its own.
    """

    arrays: DecodeArrays
    dependent: bool
    partials: Partials | None = None

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        attend_decode(
            self.arrays, q_THD, k_TKD, v_TKD, kv_N2KPD, out_THD, dependent=self.dependent, partials=self.partials
        )


class FusedDecodePlans:
    """`kernels.base.DecodePlans`: addresses and numbers of programs never change, so that graphs can hold the runs."""

    def __init__(self, sizes: Sequence[int], buffer: DecodePlanBuffer, *, dependent: bool) -> None:
        self.sizes = tuple(sorted(sizes))
        self._buffer = buffer
        self._buckets = {size: DecodeAttention(buffer.arrays(size), dependent) for size in self.sizes}

    def bucket(self, num_sequences: int) -> DecodeAttention:
        return self._buckets[bucket_size(self.sizes, num_sequences)]

    def plan(self, batch: PagedBatch) -> DecodeAttention:
        size = bucket_size(self.sizes, batch.num_sequences)
        self._buffer.plan(batch, size)
        return self._buckets[size]
