"""Linear layers of a few rows, as decoding has them: bound by reading the weight once.

A weight is cut into tiles of output features, and along the inputs into splits, so that about all programs that fit on
the GPU at once have an equal share. Each program streams its share through shared memory and writes fp32 partial sums;
nothing reduces them in a kernel of its own: whoever consumes the output adds them up, in order (`row_kernels`), so
results never depend on timing.

Kernels of this package start before their predecessor ends (programmatic dependent launch, compute capability 9.0 on)
and bring the beginning of their weight into the L2 cache while they wait.

Shape letters: T rows, N outputs, K inputs, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from neoserve.kernels.dependent_launch import launch_dependents_and_prefetch, wait_for_predecessor

LARGEST_ROWS = 64
_ROW_TILES = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program's tile: `outputs` x `inputs` weight values a step, `stages` steps in flight."""

    outputs: int
    inputs: int
    stages: int
    warps: int
    programs_per_multiprocessor: int
    prefetched_inputs: int = 128


@triton.jit(do_not_specialize=["num_rows", "steps_per_split"])  # type: ignore[untyped-decorator]
def _partial_sums(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    steps_per_split,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PREFETCHED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (tile, split): out[split, :, tile] = weight[tile, inputs of split] x^T, transposed."""
    first_k = tl.program_id(1) * steps_per_split * TILE_K
    stop_k = tl.minimum(first_k + steps_per_split * TILE_K, num_inputs)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    weight_rows = weight_ptr + n[:, None].to(tl.int64) * num_inputs
    if DEPENDENT:
        launch_dependents_and_prefetch(weight_rows + first_k, PREFETCHED)
        wait_for_predecessor()
    row = tl.arange(0, ROWS)
    k = tl.arange(0, TILE_K)
    weight_tile = weight_rows + k[None, :]
    x_tile = x_ptr + row[None, :] * num_inputs + k[:, None]
    is_row = row[None, :] < num_rows
    sums = tl.zeros((TILE_N, ROWS), dtype=tl.float32)
    for step_k in range(first_k, stop_k, TILE_K):
        weight = tl.load(weight_tile + step_k, eviction_policy="evict_first")
        x = tl.load(x_tile + step_k, mask=is_row, other=0.0)
        sums = tl.dot(weight, x, sums)
    out_rows = out_ptr + tl.program_id(1) * num_rows * num_outputs + row[None, :] * num_outputs
    tl.store(out_rows + n[:, None], sums, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _gated(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PREFETCHED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program tile: out[:, tile] = silu(x gate^T) * (x up^T), of a weight whose first half of rows is the gate."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    gate_rows = weight_ptr + n[:, None].to(tl.int64) * num_inputs
    up_rows = gate_rows + num_outputs.to(tl.int64) * num_inputs
    if DEPENDENT:
        launch_dependents_and_prefetch(gate_rows, PREFETCHED)
        launch_dependents_and_prefetch(up_rows, PREFETCHED)
        wait_for_predecessor()
    row = tl.arange(0, ROWS)
    k = tl.arange(0, TILE_K)
    x_tile = x_ptr + row[None, :] * num_inputs + k[:, None]
    is_row = row[None, :] < num_rows
    gate = tl.zeros((TILE_N, ROWS), dtype=tl.float32)
    up = tl.zeros((TILE_N, ROWS), dtype=tl.float32)
    for step_k in range(0, num_inputs, TILE_K):
        gate_weight = tl.load(gate_rows + k[None, :] + step_k, eviction_policy="evict_first")
        up_weight = tl.load(up_rows + k[None, :] + step_k, eviction_policy="evict_first")
        x = tl.load(x_tile + step_k, mask=is_row, other=0.0)
        gate = tl.dot(gate_weight, x, gate)
        up = tl.dot(up_weight, x, up)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + n)[:, None].to(tl.float32)
        up += tl.load(bias_ptr + num_outputs + n)[:, None].to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row[None, :] * num_outputs + n[:, None], out.to(out_ptr.dtype.element_ty), mask=is_row)


def row_tile(num_rows: int) -> int:
    """Rows that a program computes, padding included."""
    return next(size for size in _ROW_TILES if size >= num_rows)


def partial_sums(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, tiling: Tiling, num_splits: int, *, dependent: bool
) -> torch.Tensor:
    """fp32 `out_STN` whose sum over S is `x @ weight.T`. N and K must be multiples of the tile's."""
    num_rows, num_inputs = x_TK.shape
    num_outputs = weight_NK.shape[0]
    steps_per_split = triton.cdiv(num_inputs // tiling.inputs, num_splits)
    num_splits = triton.cdiv(num_inputs // tiling.inputs, steps_per_split)
    out_STN = x_TK.new_empty((num_splits, num_rows, num_outputs), dtype=torch.float32)
    _partial_sums[(num_outputs // tiling.outputs, num_splits)](
        x_TK,
        weight_NK,
        out_STN,
        num_rows,
        num_outputs,
        num_inputs,
        steps_per_split,
        ROWS=row_tile(num_rows),
        TILE_N=tiling.outputs,
        TILE_K=tiling.inputs,
        PREFETCHED=tiling.prefetched_inputs,
        DEPENDENT=dependent,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        launch_pdl=dependent,
    )
    return out_STN


def gated(
    x_TE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiling: Tiling, *, dependent: bool
) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, where gate is the first half of weight's rows; with their biases."""
    num_rows, num_inputs = x_TE.shape
    num_outputs = weight.shape[0] // 2
    out_TF = x_TE.new_empty((num_rows, num_outputs))
    _gated[(num_outputs // tiling.outputs,)](
        x_TE,
        weight,
        weight if bias is None else bias,
        out_TF,
        num_rows,
        num_outputs,
        num_inputs,
        ROWS=row_tile(num_rows),
        TILE_N=tiling.outputs,
        TILE_K=tiling.inputs,
        PREFETCHED=tiling.prefetched_inputs,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        launch_pdl=dependent,
    )
    return out_TF
