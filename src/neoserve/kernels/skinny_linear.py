"""Linear layers of a few rows, as decoding has them: bound by reading the weight once.

A weight is cut into tiles of output features, and along the inputs into splits, so that about all programs that fit on
the GPU at once have an equal share. Each program streams its share through shared memory and writes fp32 partial sums;
nothing reduces them in a kernel of its own: whoever consumes the output adds them up, in order (`row_kernels`), so
results never depend on timing.

Shape letters: T rows, N outputs, K inputs, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from neoserve.kernels.dependent_launch import follow_predecessor

TILE_OUTPUTS = 64
TILE_INPUTS = 128
LARGEST_ROWS = 64
_ROW_TILES = (16, 32, 64)
_WARPS = 4
_FULL = 0.9
"""Share of the programs that fit at once which is as good as all."""
_RESERVED_BYTES = 1024
"""Shared memory of each program that the system takes."""


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """Of a GPU: how many, and the shared memory of each, and of one program at most, in bytes."""

    count: int
    shared_bytes: int
    program_shared_bytes: int

    def programs(self, program_bytes: int) -> int:
        """How many programs that need so much shared memory run at once."""
        if program_bytes > self.program_shared_bytes:
            return 0
        return self.count * (self.shared_bytes // (program_bytes + _RESERVED_BYTES))


@dataclass(frozen=True, slots=True)
class Split:
    """How the inputs of a weight are shared out: `steps` tiles a split; `stages` tiles in shared memory at a time."""

    steps: int
    stages: int

    @property
    def inputs(self) -> int:
        return self.steps * TILE_INPUTS


def fits(num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    """Whether the kernels here can compute a linear layer."""
    return num_rows <= LARGEST_ROWS and num_outputs % TILE_OUTPUTS == 0 and num_inputs % TILE_INPUTS == 0


def split(num_rows: int, weight_NK: torch.Tensor, gpu: Multiprocessors) -> Split:
    """Fewest and largest programs that fill the GPU; where none do, two a multiprocessor or what else fits.

    Measured on an H200: equal shares that all run at once matter more than anything else.
    """
    tiles, steps = weight_NK.shape[0] // TILE_OUTPUTS, weight_NK.shape[1] // TILE_INPUTS
    choices = []
    for stages in (6, 4, 3):
        slots = gpu.programs(stages * _stage_bytes(num_rows, TILE_OUTPUTS))
        num_splits = max(1, min(slots // tiles, steps))
        if slots:
            choices.append((slots, tiles * num_splits / slots, Split(triton.cdiv(steps, num_splits), stages)))
    for _, filled, choice in choices:
        if _FULL <= filled <= 1:
            return choice
    return next((choice for slots, _, choice in choices if slots >= 2 * gpu.count), choices[-1][2])


def _stage_bytes(num_rows: int, num_weight_rows: int) -> int:
    return 2 * TILE_INPUTS * (num_weight_rows + row_tile(num_rows))


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
    DEPENDENT: tl.constexpr,
):
    """Program (tile, split): out[split, :, tile] = weight[tile, inputs of split] x^T, transposed."""
    first_k = tl.program_id(1) * steps_per_split * TILE_K
    stop_k = tl.minimum(first_k + steps_per_split * TILE_K, num_inputs)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    weight_rows = weight_ptr + n[:, None].to(tl.int64) * num_inputs
    follow_predecessor(DEPENDENT)
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
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program tile: out[:, tile] = silu(x gate^T) * (x up^T), of a weight whose first half of rows is the gate."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    gate_rows = weight_ptr + n[:, None].to(tl.int64) * num_inputs
    up_rows = gate_rows + num_outputs.to(tl.int64) * num_inputs
    follow_predecessor(DEPENDENT)
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


def partial_sums(x_TK: torch.Tensor, weight_NK: torch.Tensor, split: Split, *, dependent: bool) -> torch.Tensor:
    """fp32 `out_STN` whose sum over S is `x @ weight.T`, of contiguous tensors that `fits` accepts."""
    num_rows, num_inputs = x_TK.shape
    num_outputs = weight_NK.shape[0]
    num_splits = triton.cdiv(num_inputs, split.inputs)
    out_STN = x_TK.new_empty((num_splits, num_rows, num_outputs), dtype=torch.float32)
    _partial_sums[(num_outputs // TILE_OUTPUTS, num_splits)](
        x_TK,
        weight_NK,
        out_STN,
        num_rows,
        num_outputs,
        num_inputs,
        split.steps,
        ROWS=row_tile(num_rows),
        TILE_N=TILE_OUTPUTS,
        TILE_K=TILE_INPUTS,
        DEPENDENT=dependent,
        num_warps=_WARPS,
        num_stages=split.stages,
        launch_pdl=dependent,
    )
    return out_STN


def gated(
    x_TE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gpu: Multiprocessors, *, dependent: bool
) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, where gate is the first half of weight's rows; with their biases.

    Contiguous tensors, whose halves `fits` accepts. Two programs a multiprocessor hide each other's beginnings.
    """
    num_rows, num_inputs = x_TE.shape
    num_outputs = weight.shape[0] // 2
    stage_bytes = _stage_bytes(num_rows, 2 * TILE_OUTPUTS)
    out_TF = x_TE.new_empty((num_rows, num_outputs))
    _gated[(num_outputs // TILE_OUTPUTS,)](
        x_TE,
        weight,
        weight if bias is None else bias,
        out_TF,
        num_rows,
        num_outputs,
        num_inputs,
        ROWS=row_tile(num_rows),
        TILE_N=TILE_OUTPUTS,
        TILE_K=TILE_INPUTS,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=_WARPS,
        num_stages=3 if gpu.programs(3 * stage_bytes) >= 2 * gpu.count else 2,
        launch_pdl=dependent,
    )
    return out_TF
