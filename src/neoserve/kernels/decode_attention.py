"""Decode attention over the paged KV, one new row a sequence, which is appended on the way.

Sequences are cut into chunks of equal size (`Chunks`), so that programs have equal shares however lengths differ; a
second kernel merges a sequence's chunks, in order.

Shape letters: B sequences, H query heads, K kv heads, G = H / K, D head dim, N blocks, P tokens per block, W chunks.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from neoserve.kernels.dependent_launch import launch_dependents, wait_for_predecessor

_SMALLEST_CHUNK = 64


@triton.jit  # type: ignore[untyped-decorator]
def _attend_chunks(  # type: ignore[no-untyped-def]
    qkv_ptr,
    kv_ptr,
    block_ids_ptr,
    block_start_ptr,
    lengths_ptr,
    chunk_sequence_ptr,
    chunk_start_ptr,
    partial_ptr,
    weight_ptr,
    qkv_row_stride,
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
    if DEPENDENT:
        launch_dependents()
        wait_for_predecessor()
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
    row = qkv_ptr + sequence * qkv_row_stride
    q = tl.load(row + (head * GROUP + g[:, None]) * D + d[None, :], mask=is_head, other=0.0)
    top = tl.full((GROUP_TILE,), -float("inf"), dtype=tl.float32)
    weights = tl.zeros((GROUP_TILE,), dtype=tl.float32)
    values = tl.zeros((GROUP_TILE, D), dtype=tl.float32)
    if chunk == first_chunk:  # the first chunk takes the new token, and appends it
        k_new = tl.load(row + (NUM_KV_HEADS * GROUP + head) * D + d)
        v_new = tl.load(row + (NUM_KV_HEADS * (GROUP + 1) + head) * D + d)
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
        k = tl.load(k_rows[None, :] + d[:, None], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        v = tl.load(k_rows[:, None] + NUM_KV_HEADS * P * D + d[None, :], mask=inside[:, None], other=0.0, eviction_policy="evict_first")
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
    partial_ptr,
    weight_ptr,
    chunk_start_ptr,
    out_ptr,
    num_heads,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        launch_dependents()
        wait_for_predecessor()
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
        log_weight = tl.load(weight_ptr + chunk * num_heads + head, mask=inside, other=-float("inf"))
        partial = tl.load(
            partial_ptr + (chunk[:, None] * num_heads + head) * D + d[None, :], mask=inside[:, None], other=0.0
        )
        new_top = tl.maximum(top, tl.max(log_weight))
        weight = tl.exp2(log_weight - new_top)
        shrink = tl.exp2(top - new_top)
        values = values * shrink + tl.sum(weight[:, None] * partial, axis=0)
        weights = weights * shrink + tl.sum(weight)
        top = new_top
    tl.store(out_ptr + (sequence * num_heads + head) * D + d, (values / weights).to(out_ptr.dtype.element_ty))


def chunk_arrays(lengths_B: np.ndarray, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `chunk_sequence_W`, the sequence of each of W = num_chunks chunks (-1: none), and `chunk_start_B1`.

    A sequence of n cached tokens gets its share of the chunks, at least one and at most one for `_SMALLEST_CHUNK`
    tokens. Raises ValueError when there are more sequences than chunks.
    """
    cached = np.maximum(lengths_B.astype(np.int64) - 1, 1)
    spare = num_chunks - len(cached)
    if spare < 0:
        raise ValueError(f"{len(cached)} sequences; there are {num_chunks} chunks")
    size = max(_SMALLEST_CHUNK, -(-int(cached.sum()) // max(spare, 1)))
    counts = -(-cached // size) if spare else np.ones_like(cached)
    chunk_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    chunk_sequence = np.full(num_chunks, -1, dtype=np.int32)
    chunk_sequence[: chunk_start[-1]] = np.repeat(np.arange(len(cached), dtype=np.int32), counts)
    return chunk_sequence, chunk_start


def attend(
    qkv_TCD: torch.Tensor,
    kv_N2KPD: torch.Tensor,
    block_ids: torch.Tensor,
    block_start: torch.Tensor,
    lengths: torch.Tensor,
    chunk_sequence: torch.Tensor,
    chunk_start: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    dependent: bool,
    tile: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> None:
    num_kv_heads, block_size, head_dim = kv_N2KPD.shape[2:]
    num_sequences, num_heads = out_THD.shape[:2]
    group = num_heads // num_kv_heads
    num_chunks = chunk_sequence.numel()
    partial = out_THD.new_empty((num_chunks, num_heads, head_dim), dtype=torch.float32)
    weight = out_THD.new_empty((num_chunks, num_heads), dtype=torch.float32)
    _attend_chunks[(num_kv_heads, num_chunks)](
        qkv_TCD, kv_N2KPD, block_ids, block_start, lengths, chunk_sequence, chunk_start, partial, weight,
        qkv_TCD.stride(0), kv_N2KPD.stride(0), head_dim**-0.5 * 1.4426950408889634,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, GROUP_TILE=max(16, triton.next_power_of_2(group)),
        P=block_size, D=head_dim, TILE=tile, DEPENDENT=dependent, num_warps=warps, num_stages=stages, launch_pdl=dependent,
    )  # fmt: skip
    _merge_chunks[(num_heads, num_sequences)](
        partial, weight, chunk_start, out_THD, num_heads,
        D=head_dim, TILE=16, DEPENDENT=dependent, num_warps=1, launch_pdl=dependent,
    )  # fmt: skip
