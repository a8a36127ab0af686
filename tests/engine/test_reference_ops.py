"""Reference operations against formulas written another way, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.reference import ReferenceOps

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
OPS = ReferenceOps()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_over_the_last_dimension_of_any_shape(dtype: torch.dtype) -> None:
    x = 100 * random(5, 3, 16, dtype=dtype)
    weight = random(16, dtype=dtype, seed=1)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    result = OPS.rms_norm(x, weight, 1e-6)
    assert result.dtype == dtype
    assert_near(result, expected)


def test_rms_norm_does_not_overflow_float16() -> None:
    x = torch.full((1, 8), 60000.0, dtype=torch.float16)
    assert torch.equal(OPS.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones(1, 8, dtype=torch.float16))


def test_add_rms_norm_updates_the_residual_in_place() -> None:
    x, residual, weight = random(4, 16), random(4, 16, seed=1), random(16, seed=2)
    expected = x + residual
    address = residual.data_ptr()
    result = OPS.add_rms_norm(x.clone(), residual, weight, 1e-5)
    assert residual.data_ptr() == address
    assert torch.equal(residual, expected)
    assert torch.equal(result, OPS.rms_norm(expected, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_rope_turns_pairs_of_halves_in_place_inside_fused_rows(dtype: torch.dtype, position_dtype: torch.dtype) -> None:
    angles_Pd = torch.outer(torch.arange(50.0), 10000.0 ** (-torch.arange(0, 16, 2) / 16))
    cache_PD = torch.cat((angles_Pd.cos(), angles_Pd.sin()), -1)
    qkv_TCD = random(3, 6, 16, dtype=dtype)
    before = qkv_TCD.double()
    positions = [0, 7, 49]
    OPS.rope(qkv_TCD[:, :3], qkv_TCD[:, 3:5], torch.tensor(positions, dtype=position_dtype), cache_PD)
    # As complex numbers, rotating is multiplying by exp(i angle).
    turned = torch.complex(before[..., :8], before[..., 8:]) * torch.exp(1j * angles_Pd[positions].double())[:, None]
    assert_near(qkv_TCD[:, :5], torch.cat((turned.real, turned.imag), -1)[:, :5])
    assert torch.equal(qkv_TCD[:, 5].double(), before[:, 5])
    assert torch.equal(qkv_TCD[0].double(), before[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = random(3, 20, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_near(OPS.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)


class Sequences:
    """Random K and V of some sequences, all but their newest rows in a paged pool already; naive attention of them."""

    def __init__(self, lengths: list[int], counts: list[int], *, group: int, head_dim: int, block_size: int) -> None:
        self.group, self.num_kv_heads, self.head_dim, self.lengths, self.counts = group, 2, head_dim, lengths, counts
        num_blocks = [-(-length // block_size) for length in lengths]
        self.batch = PagedBatch(
            row_start=np.cumsum([0, *counts]).astype(np.int32),
            block_start=np.cumsum([0, *num_blocks]).astype(np.int32),
            block_ids=np.random.default_rng(0).permutation(sum(num_blocks) + 5)[: sum(num_blocks)].astype(np.int32),
            lengths=np.array(lengths, np.int32),
        )
        self.pool_size = (sum(num_blocks) + 5, 2, 2, block_size, head_dim)

    def run(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What the operations give after appending all tokens in two steps, and the naive result."""
        kv_N2KPD = torch.full(self.pool_size, torch.nan, dtype=dtype)
        keys = [random(length, 2, self.head_dim, dtype=dtype, seed=i) for i, length in enumerate(self.lengths)]
        values = [random(length, 2, self.head_dim, dtype=dtype, seed=i + 99) for i, length in enumerate(self.lengths)]
        old = [length - count for length, count in zip(self.lengths, self.counts, strict=True)]
        b = self.batch
        earlier = PagedBatch(np.cumsum([0, *old]).astype(np.int32), b.block_start, b.block_ids, np.array(old, np.int32))
        first = OPS.plan_attention(earlier, decode=False)
        earlier_k, earlier_v = (torch.cat([x[:n] for x, n in zip(xs, old, strict=True)]) for xs in (keys, values))
        any_THD = random(earlier.num_rows, 2 * self.group, self.head_dim, dtype=dtype, seed=6)
        first.run(any_THD, earlier_k, earlier_v, kv_N2KPD, torch.empty_like(any_THD))
        q_THD = random(b.num_rows, 2 * self.group, self.head_dim, dtype=dtype, seed=7)
        out_THD = torch.empty_like(q_THD)
        plan = OPS.plan_attention(b, decode=max(self.counts) == 1)
        newer_k, newer_v = (torch.cat([x[n:] for x, n in zip(xs, old, strict=True)]) for xs in (keys, values))
        plan.run(q_THD, newer_k, newer_v, kv_N2KPD, out_THD)
        return out_THD, self.naive(q_THD.double(), keys, values)

    def naive(self, q_THD: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        out, row = torch.empty_like(q_THD), 0
        for length, count, key, value in zip(self.lengths, self.counts, keys, values, strict=True):
            for position in range(length - count, length):
                for head in range(q_THD.shape[1]):
                    k, v = (x[: position + 1, head // self.group].double() for x in (key, value))
                    out[row, head] = (k @ q_THD[row, head] / math.sqrt(self.head_dim)).softmax(0) @ v
                row += 1
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_decode_attention(dtype: torch.dtype, group: int, block_size: int) -> None:
    sequences = Sequences([1, 16, 17, 70], [1] * 4, group=group, head_dim=32, block_size=block_size)
    assert_near(*sequences.run(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_causal_attention_of_whole_prompts_and_later_chunks(dtype: torch.dtype, head_dim: int) -> None:
    sequences = Sequences([20, 33, 40, 5], [20, 7, 17, 1], group=2, head_dim=head_dim, block_size=16)
    assert_near(*sequences.run(dtype))


def test_a_sequence_does_not_depend_on_the_others() -> None:
    together = Sequences([30, 50], [1, 1], group=4, head_dim=64, block_size=16).run(torch.float32)[0]
    alone = Sequences([30], [1], group=4, head_dim=64, block_size=16)
    # The same q, k and v by their seeds; other blocks.
    assert torch.equal(alone.run(torch.float32)[0], together[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_go_to_the_host_layout_and_back(dtype: torch.dtype) -> None:
    L, K, P, D = 2, 3, 4, 8
    kv = random(L, 6, 2, K, P, D, dtype=dtype)
    host = torch.zeros(L, 5, 2 * K * P * D, dtype=dtype)
    OPS.block_copies(kv, torch.tensor([5, 0]), host, torch.tensor([1, 4]), to_host=True).run(0, 0, L)
    for source, target in ((5, 1), (0, 4)):
        for head in range(K):
            k_tile, v_tile = host[1, target].view(K, 2, P * D)[head]
            assert torch.equal(k_tile.view(P, D), kv[1, source, 0, head])
            for token in range(P):
                # csrc/attention/attention.h: V of a 2-byte type is [P / 2][D][2].
                v = (
                    v_tile.view(P // 2, D, 2)[token // 2, :, token % 2]
                    if dtype.itemsize == 2
                    else v_tile.view(P, D)[token]
                )
                assert torch.equal(v, kv[1, source, 1, head, token])
    assert not host[:, [0, 2, 3]].any()
    back = torch.zeros_like(kv)
    copies = OPS.block_copies(back, torch.tensor([2, 3]), host, torch.tensor([4, 1]), to_host=False)
    copies.run(0, 0, L)
    assert torch.equal(back[:, [2, 3]], kv[:, [0, 5]])
    assert not back[:, [0, 1, 4, 5]].any()
    copies.run(0, 1)
    assert torch.equal(back[:, [2, 3]], kv[1:, [0, 5]].expand(L, -1, -1, -1, -1, -1))
