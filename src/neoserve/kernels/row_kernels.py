"""What consumes the partial sums of a linear layer of few rows: one program a row, or a row's head.

Shape letters: S splits, T rows, E model dim, C = H + 2K fused heads (H query, then K key, then K value), D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from neoserve.kernels.base import Heads
from neoserve.kernels.dependent_launch import follow_predecessor


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    partials_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    eps,
    num_rows,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    follow_predecessor(DEPENDENT)
    row = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    inside = e < E
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials_ptr + (split * num_rows + row) * E + e, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + e, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    residual_row = residual_ptr + row * E + e
    total = (total + tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(residual_row, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total) / E + eps)
    normed = total * scale * tl.load(norm_ptr + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * E + e, normed.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _rope_heads(  # type: ignore[no-untyped-def]
    partials_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    positions_ptr,
    cache_ptr,
    out_ptr,
    eps,
    num_rows,
    num_query_heads,
    num_rotated_heads,
    num_heads,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    follow_predecessor(DEPENDENT)
    head = tl.program_id(0)
    row = tl.program_id(1)
    half = tl.arange(0, HALF)
    first = tl.zeros((HALF,), dtype=tl.float32)
    second = tl.zeros((HALF,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        source = partials_ptr + ((split * num_rows + row) * num_heads + head) * 2 * HALF + half
        first += tl.load(source)
        second += tl.load(source + HALF)
    if HAS_BIAS:
        first += tl.load(bias_ptr + head * 2 * HALF + half).to(tl.float32)
        second += tl.load(bias_ptr + head * 2 * HALF + HALF + half).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if head < num_rotated_heads:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF) + eps)
            weight_ptr = q_norm_ptr if head < num_query_heads else k_norm_ptr
            first = first * scale * tl.load(weight_ptr + half).to(tl.float32)
            second = second * scale * tl.load(weight_ptr + HALF + half).to(tl.float32)
        angles = cache_ptr + tl.load(positions_ptr + row) * 2 * HALF + half
        cos = tl.load(angles)
        sin = tl.load(angles + HALF)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    target = out_ptr + (row * num_heads + head) * 2 * HALF + half
    tl.store(target, first.to(dtype))
    tl.store(target + HALF, second.to(dtype))


def add_norm(
    partials_STE: torch.Tensor,
    bias_E: torch.Tensor | None,
    residual_TE: torch.Tensor,
    norm_E: torch.Tensor,
    eps: float,
    *,
    dependent: bool,
) -> torch.Tensor:
    """residual += the sum of the partials, and the bias, in place; returns rms_norm(residual)."""
    num_splits, num_rows, width = partials_STE.shape
    out_TE = torch.empty_like(residual_TE)
    _add_norm[(num_rows,)](
        partials_STE,
        norm_E if bias_E is None else bias_E,
        residual_TE,
        norm_E,
        out_TE,
        eps,
        num_rows,
        E=width,
        WIDTH=triton.next_power_of_2(width),
        SPLITS=num_splits,
        HAS_BIAS=bias_E is not None,
        DEPENDENT=dependent,
        num_warps=min(16, max(1, triton.next_power_of_2(width) // 512)),
        launch_pdl=dependent,
    )
    return out_TE


def rope_heads(
    partials_STX: torch.Tensor,
    bias: torch.Tensor | None,
    heads: Heads,
    positions_T: torch.Tensor,
    dtype: torch.dtype,
    *,
    dependent: bool,
) -> torch.Tensor:
    """`qkv_TCD` of the partials, X = CD: bias, norms of the q and k heads, rope."""
    num_splits, num_rows, width = partials_STX.shape
    head_dim = heads.cache_PD.shape[1]
    num_heads = width // head_dim
    out_TCD = torch.empty((num_rows, num_heads, head_dim), dtype=dtype, device=partials_STX.device)
    q_norm_D, k_norm_D = heads.norms or (out_TCD, out_TCD)
    _rope_heads[(num_heads, num_rows)](
        partials_STX,
        out_TCD if bias is None else bias,
        q_norm_D,
        k_norm_D,
        positions_T,
        heads.cache_PD,
        out_TCD,
        heads.norm_eps,
        num_rows,
        heads.num_query_heads,
        heads.num_query_heads + heads.num_kv_heads,
        num_heads,
        HALF=head_dim // 2,
        SPLITS=num_splits,
        HAS_BIAS=bias is not None,
        HAS_NORM=heads.norms is not None,
        DEPENDENT=dependent,
        num_warps=1,
        launch_pdl=dependent,
    )
    return out_TCD
