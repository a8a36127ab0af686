"""The MLP's activation, in place: beside its input, the largest tensor of a lap, it takes no memory of its own.

Shape letters: T rows, F ffn dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from neoserve.kernels.launcher import Launcher

_TILE = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row, tile): the tile of the row's gate becomes silu(gate) * up."""
    f = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = f < WIDTH
    gate_ptr = gate_up_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + f
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate_ptr, (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_silu_and_mul, num_warps=8)


def silu_and_mul_in_place(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, a view of the gate's half. gate_up_T2F: contiguous."""
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    _launch((num_rows, triton.cdiv(width, _TILE), 1), gate_up_T2F, constants=(width, _TILE))
    return gate_up_T2F[:, :width]
