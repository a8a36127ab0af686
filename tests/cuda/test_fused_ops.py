"""The kernels for few rows equal the formulas in float32, for sizes that they tile and for those that fall back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from neoserve.kernels.base import Heads
from neoserve.kernels.fused_ops import FusedOps

from .conftest import attention_shape
from .test_ops import DEVICE, error

if torch.cuda.get_device_capability(0) < (8, 0):
    pytest.skip("the kernels need compute capability 8.0", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]
ROWS = [1, 17, 33, 65]
SIZES = [(512, 256), (64, 128), (4096, 1024), (448, 8192), (8192, 384), (320, 200), (96, 256)]
"""Outputs and inputs; the kernels cannot tile the last two."""
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make_ops(dtype: torch.dtype) -> FusedOps:
    return FusedOps(attention_shape(8, 2, 64), dtype, 16, DEVICE)


def random(*size: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(size, device=DEVICE)).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_add_rms_norm(dtype: torch.dtype, rows: int, size: tuple[int, int], has_bias: bool) -> None:
    x, weight = random(rows, size[1], dtype=dtype), random(*size, dtype=dtype, scale=0.05)
    bias = random(size[0], dtype=dtype) if has_bias else None
    residual, norm_weight = random(rows, size[0], dtype=dtype), random(size[0], dtype=dtype)
    total = residual.float() + linear(x, weight, bias)
    found = make_ops(dtype).linear_add_rms_norm(x, weight, bias, residual, norm_weight, 1e-5)
    assert error(residual, total) < TOLERANCE[dtype]
    assert error(found, normed(total, norm_weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_silu_and_mul(dtype: torch.dtype, rows: int, size: tuple[int, int], has_bias: bool) -> None:
    x, weight = random(rows, size[1], dtype=dtype), random(2 * size[0], size[1], dtype=dtype, scale=0.05)
    bias = random(2 * size[0], dtype=dtype) if has_bias else None
    gate, up = linear(x, weight, bias).chunk(2, dim=-1)
    found = make_ops(dtype).linear_silu_and_mul(x, weight, bias)
    assert error(found, functional.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [(256, 512), (192, 128), (128, 192)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_mlp_whose_layers_fit_the_tiles_or_not(
    dtype: torch.dtype, rows: int, size: tuple[int, int], has_bias: bool
) -> None:
    width, ffn_size = size
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    gate_up, down = (random(*shape, dtype=dtype, scale=0.05) for shape in ((2 * ffn_size, width), (width, ffn_size)))
    biases = [random(length, dtype=dtype) if has_bias else None for length in (2 * ffn_size, width)]
    norm_weight = random(width, dtype=dtype)
    gate, up = linear(x, gate_up, biases[0]).chunk(2, dim=-1)
    total = residual.float() + linear((functional.silu(gate) * up).to(dtype), down, biases[1])
    ops = make_ops(dtype)
    h = ops.linear_silu_and_mul(x, gate_up, biases[0])
    found = ops.linear_add_rms_norm(h, down, biases[1], residual, norm_weight, 1e-5)
    assert error(found, normed(total, norm_weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 64, 65])
@pytest.mark.parametrize("heads", [(8, 2, 64), (32, 8, 128), (5, 5, 128), (8, 1, 256)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
def test_linear_heads(
    dtype: torch.dtype, rows: int, heads: tuple[int, int, int], has_bias: bool, has_norms: bool
) -> None:
    num_query_heads, num_kv_heads, head_dim = heads
    num_rotated, num_heads = num_query_heads + num_kv_heads, num_query_heads + 2 * num_kv_heads
    x, weight = random(rows, 512, dtype=dtype), random(num_heads * head_dim, 512, dtype=dtype, scale=0.05)
    bias = random(num_heads * head_dim, dtype=dtype) if has_bias else None
    norms = (random(head_dim, dtype=dtype), random(head_dim, dtype=dtype)) if has_norms else None
    positions = torch.randint(0, 3000, (rows,), device=DEVICE)
    angles = torch.arange(3000, device=DEVICE)[:, None] / 10000 ** (
        torch.arange(0, head_dim, 2, device=DEVICE) / head_dim
    )
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    expected = linear(x, weight, bias).view(rows, num_heads, head_dim)
    if norms is not None:
        expected[:, :num_query_heads] = normed(expected[:, :num_query_heads], norms[0], 1e-6)
        expected[:, num_query_heads:num_rotated] = normed(expected[:, num_query_heads:num_rotated], norms[1], 1e-6)
    cos, sin = cache[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = expected[:, :num_rotated].chunk(2, dim=-1)
    expected[:, :num_rotated] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    made_of = Heads(num_query_heads, num_kv_heads, norms, 1e-6, cache)
    found = make_ops(dtype).linear_heads(x, weight, bias, made_of, positions)
    assert found.is_contiguous()
    assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 18, 65])
@pytest.mark.parametrize("size", [(128256, 256), (151, 256)], ids=str)
def test_logits_are_float32(rows: int, size: tuple[int, int]) -> None:
    x, weight = random(rows, size[1], dtype=torch.float16), random(*size, dtype=torch.float16)
    found = make_ops(torch.float16).logits(x, weight)
    assert found.dtype == torch.float32
    assert error(found, linear(x, weight, None)) < 1e-3


def test_a_captured_chain_gives_the_same_bits_each_time_and_follows_its_input() -> None:
    """Kernels that start before their predecessors end: a missing wait would show as a difference between replays."""
    dtype, rows, size = torch.bfloat16, 18, 2048
    ops = make_ops(dtype)
    weights = [random(size, size, dtype=dtype, scale=0.02) for _ in range(6)]
    gates = [random(2 * size, size, dtype=dtype, scale=0.02) for _ in range(6)]
    norm_weight = random(size, dtype=dtype)
    start, residual_start = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype)

    def chain() -> torch.Tensor:
        x, residual = start, residual_start.clone()
        for weight, gate in zip(weights, gates, strict=True):
            h = ops.linear_silu_and_mul(x, gate, None)
            x = ops.linear_add_rms_norm(h, weight, None, residual, norm_weight, 1e-5)
        return x

    eager = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(50):
        graph.replay()
        assert torch.equal(result, eager)
    start.normal_()
    graph.replay()
    assert not torch.equal(result, eager)
    assert torch.equal(result, chain())


def test_rows_do_not_depend_on_each_other() -> None:
    ops, weight = make_ops(torch.bfloat16), random(1024, 1024, dtype=torch.bfloat16)
    x = random(16, 1024, dtype=torch.bfloat16)
    together = ops.linear_silu_and_mul(x, weight, None)
    alone = [ops.linear_silu_and_mul(x[row : row + 1], weight, None) for row in range(16)]
    assert torch.equal(together, torch.cat(alone))
