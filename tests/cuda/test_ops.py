"""FlashInfer's operations equal the formulas in float32."""

import math

import numpy as np
import pytest
import torch

from neoserve.core.errors import ConfigError, UnsupportedModelError
from neoserve.kernels.base import PagedBatch
from neoserve.kernels.flashinfer_ops import FlashInferOps
from neoserve.kernels.fused_ops import FusedOps

from .conftest import attention_shape

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float16] + ([torch.bfloat16] if torch.cuda.get_device_capability(0) >= (8, 0) else [])
KINDS = [FlashInferOps] + ([FusedOps] if torch.cuda.get_device_capability(0) >= (8, 0) else [])
HEADS = [(64, 8, 128), (32, 32, 128), (32, 8, 64), (28, 4, 128), (8, 1, 256), (12, 6, 64), (16, 16, 256), (40, 1, 128)]


def make_ops(
    heads: tuple[int, int, int], dtype: torch.dtype, block_size: int = 16, kind: type[FlashInferOps] = FlashInferOps
) -> FlashInferOps:
    return kind(attention_shape(*heads), dtype, block_size, DEVICE)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected norm; a NaN is infinitely wrong."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if math.isfinite(difference) else math.inf


def random_batch(lengths: list[int], counts: list[int], block_size: int, num_blocks: int) -> PagedBatch:
    """Sequences with scattered, disjoint blocks."""
    per_sequence = [-(-length // block_size) for length in lengths]
    ids = np.random.default_rng(0).permutation(num_blocks)[: sum(per_sequence)]
    return PagedBatch(
        row_start=np.cumsum([0, *counts], dtype=np.int32),
        block_start=np.cumsum([0, *per_sequence], dtype=np.int32),
        block_ids=ids.astype(np.int32),
        lengths=np.array(lengths, dtype=np.int32),
    )


def tokens_of(kv_N2KPD: torch.Tensor, batch: PagedBatch, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's k and v, [K, length, D] float32."""
    first, stop = batch.block_start[sequence], batch.block_start[sequence + 1]
    blocks = torch.from_numpy(batch.block_ids[first:stop]).long().to(kv_N2KPD.device)
    k, v = kv_N2KPD[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : batch.lengths[sequence]].float()
    return k, v


def expected_attention(q_THD: torch.Tensor, kv_N2KPD: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
    """Softmax attention by its formula, a sequence at a time."""
    outputs = []
    for sequence, length in enumerate(batch.lengths.tolist()):
        q = q_THD[batch.row_start[sequence] : batch.row_start[sequence + 1]].float().transpose(0, 1)
        k, v = tokens_of(kv_N2KPD, batch, sequence)
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        token = torch.arange(length, device=q.device)
        row_position = torch.arange(length - q.shape[1], length, device=q.device)
        scores.masked_fill_(token > row_position[:, None], -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def fused_rows(batch: PagedBatch, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and v as views of fused rows."""
    num_query_heads, num_kv_heads, head_dim = heads
    fused = torch.randn(batch.num_rows, num_query_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    return fused.split((num_query_heads, num_kv_heads, num_kv_heads), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_norms(dtype: torch.dtype, rows: int) -> None:
    ops = make_ops((8, 2, 64), dtype)
    x, residual = (torch.randn(rows, 1024, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(1024, device=DEVICE).to(dtype)

    def norm(t: torch.Tensor) -> torch.Tensor:
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-5) * weight.float()

    assert error(ops.rms_norm(x, weight, 1e-5), norm(x.float())) < 5e-3
    total = x.float() + residual.float()
    assert error(ops.add_rms_norm(x.clone(), residual, weight, 1e-5), norm(total)) < 5e-3
    assert error(residual, total) < 5e-3


def test_the_norm_of_heads_inside_fused_rows() -> None:
    ops = make_ops((32, 8, 128), torch.float16)
    fused = torch.randn(9, 48, 128, device=DEVICE).half()
    weight = torch.randn(128, device=DEVICE).half()
    q = fused[:, :32]
    expected = q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    assert error(ops.rms_norm(q, weight, 1e-6), expected) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rope_rotates_views_of_fused_rows_and_leaves_v(
    dtype: torch.dtype, index_dtype: torch.dtype, head_dim: int
) -> None:
    ops = make_ops((8, 2, head_dim), dtype)
    fused = torch.randn(33, 12, head_dim, device=DEVICE).to(dtype)
    before = fused.float()
    positions = torch.randint(0, 5000, (33,), device=DEVICE, dtype=index_dtype)
    angles = torch.arange(5000, device=DEVICE)[:, None] * 10000 ** -(
        torch.arange(0, head_dim, 2, device=DEVICE) / head_dim
    )
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    ops.rope(fused[:, :8], fused[:, 8:10], positions, cache)
    cos, sin = cache[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    first, second = before[:, :10].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    assert error(fused[:, :10], rotated) < 5e-3
    assert torch.equal(fused[:, 10:].float(), before[:, 10:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(17, 2 * 1408, device=DEVICE).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    found = make_ops((8, 2, 64), dtype).silu_and_mul(gate_up)
    assert error(found, torch.nn.functional.silu(gate) * up) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_append_and_attention(
    kind: type[FlashInferOps], dtype: torch.dtype, heads: tuple[int, int, int], decode: bool
) -> None:
    ops = make_ops(heads, dtype, kind=kind)
    lengths = [1, 16, 17, 500, 1023]
    counts = [1] * 5 if decode else [1, 16, 5, 500, 130]
    batch = random_batch(lengths, counts, 16, 128)
    kv = torch.randn(128, 2, heads[1], 16, heads[2], device=DEVICE).to(dtype)
    q, k, v = fused_rows(batch, heads, dtype)
    out = torch.full((batch.num_rows, heads[0], heads[2]), math.nan, device=DEVICE, dtype=dtype)
    attention = ops.plan_attention(batch, decode=decode)
    attention.run(q, k, v, kv, out)
    for sequence in range(batch.num_sequences):
        stored_k, stored_v = tokens_of(kv, batch, sequence)
        rows = slice(batch.row_start[sequence], batch.row_start[sequence + 1])
        assert torch.equal(stored_k[:, -counts[sequence] :].transpose(0, 1), k[rows].float())
        assert torch.equal(stored_v[:, -counts[sequence] :].transpose(0, 1), v[rows].float())
    assert error(out, expected_attention(q, kv, batch)) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_plans_in_flight_together_keep_their_own_batches(kind: type[FlashInferOps]) -> None:
    heads, dtype = (32, 8, 128), DTYPES[-1]
    ops = make_ops(heads, dtype, kind=kind)
    kv = torch.randn(600, 2, 8, 16, 128, device=DEVICE).to(dtype)
    batches = [random_batch([100 * n + 7] * n, [1] * n, 16, 600) for n in (1, 2, 3, 9)]
    for _ in range(2):
        plans = [ops.plan_attention(batch, decode=True) for batch in batches]
        for batch, plan in zip(batches, plans, strict=True):
            q, k, v = fused_rows(batch, heads, dtype)
            out = torch.empty_like(q)
            plan.run(q, k, v, kv, out)
            assert error(out, expected_attention(q, kv, batch)) < 5e-3
        del plans, plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(64, 8, 128), (32, 32, 128), (28, 4, 128)])
def test_a_captured_bucket_serves_batches_that_grow_and_shrink(
    kind: type[FlashInferOps], heads: tuple[int, int, int]
) -> None:
    dtype = DTYPES[-1]
    ops = make_ops(heads, dtype, kind=kind)
    num_blocks = 2000
    kv = torch.randn(num_blocks + 1, 2, heads[1], 16, heads[2], device=DEVICE).to(dtype)
    buckets = ops.decode_plans((4, 16), max_blocks=num_blocks, padding_block=num_blocks)
    static = torch.zeros(16, heads[0] + 2 * heads[1], heads[2], device=DEVICE, dtype=dtype)
    outs = {size: torch.empty(size, heads[0], heads[2], device=DEVICE, dtype=dtype) for size in buckets.sizes}
    graphs = {}
    for size in buckets.sizes:
        bucket = buckets.plan(random_batch([16] * size, [1] * size, 16, num_blocks))
        q, k, v = static[:size].split((heads[0], heads[1], heads[1]), dim=1)
        bucket.run(q, k, v, kv, outs[size])
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size]):
            bucket.run(q, k, v, kv, outs[size])
    for lengths in ([3000], [1, 1, 1, 1], [5, 900, 33], [64] * 9, [1500, 2000, 17, 800, 3], list(range(1, 17))):
        batch = random_batch(lengths, [1] * len(lengths), 16, num_blocks)
        static.normal_()
        buckets.plan(batch)
        size = next(size for size in buckets.sizes if size >= len(lengths))
        graphs[size].replay()
        q = static[: len(lengths), : heads[0]]
        assert error(outs[size][: len(lengths)], expected_attention(q, kv, batch)) < 5e-3
        newest_k, _ = tokens_of(kv, batch, 0)
        assert torch.equal(newest_k[:, -1], static[0, heads[0] : heads[0] + heads[1]].float())


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_refuse_what_does_not_fit(kind: type[FlashInferOps]) -> None:
    buckets = make_ops((32, 8, 128), torch.float16, kind=kind).decode_plans((2,), max_blocks=8, padding_block=100)
    with pytest.raises(ValueError, match="largest bucket is 2"):
        buckets.plan(random_batch([1, 1, 1], [1, 1, 1], 16, 100))
    with pytest.raises(ValueError, match="blocks"):
        buckets.plan(random_batch([200], [1], 16, 100))


@pytest.mark.parametrize("heads", [(64, 8, 128), (32, 32, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_reach_the_host_in_its_layout_and_come_back(heads: tuple[int, int, int], block_size: int) -> None:
    ops = make_ops(heads, torch.float16, block_size)
    num_layers, num_kv_heads, head_dim = 3, heads[1], heads[2]
    kv = torch.randn(num_layers, 40, 2, num_kv_heads, block_size, head_dim, device=DEVICE).half()
    host = torch.zeros(num_layers, 50, kv[0, 0].numel(), dtype=torch.float16, pin_memory=True)
    source = torch.randperm(40, device=DEVICE)[:17]
    target = torch.randperm(50, device=DEVICE)[:17]
    ops.block_copies(kv, source, host, target, to_host=True).run(0, 0, num_layers)
    torch.cuda.synchronize()
    tiles = host[:, target.cpu()].view(num_layers, 17, num_kv_heads, 2, -1)
    moved = kv[:, source].cpu()
    assert torch.equal(tiles[:, :, :, 0].view(num_layers, 17, num_kv_heads, block_size, head_dim), moved[:, :, 0])
    v = tiles[:, :, :, 1].view(num_layers, 17, num_kv_heads, block_size // 2, head_dim, 2)
    assert torch.equal(v.transpose(-1, -2).reshape(moved[:, :, 1].shape), moved[:, :, 1])
    back = torch.zeros_like(kv)
    copies = ops.block_copies(back, source, host, target, to_host=False)
    copies.run(0, 0, num_layers)
    expected = torch.zeros_like(kv)
    expected[:, source] = kv[:, source]
    assert torch.equal(back, expected)
    copies.run(0, 2)
    expected[0, source] = kv[2, source]
    assert torch.equal(back, expected)


def test_what_the_kernels_lack_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head dim 80"):
        make_ops((32, 32, 80), torch.float16)
    with pytest.raises(ConfigError, match="float32"):
        make_ops((32, 32, 128), torch.float32)
