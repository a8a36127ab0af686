import gc

import numpy as np
import pytest
import torch

from neoserve import _native
from neoserve.kernels.host_attention import allocate_host_kv, from_host_layout, host_attention, to_host_layout


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("touched", [True, False])
def test_memory_is_zeroed_aligned_and_writable(huge_pages: bool, touched: bool) -> None:
    num_bytes = 5 * 2**20 + 3
    touch_cpus = _native.allowed_cpus() if touched else []
    memory = _native.HostMemory(num_bytes, huge_pages=huge_pages, touch_cpus=touch_cpus)
    data = memory.array()
    assert memory.num_bytes == num_bytes == data.nbytes
    assert memory.address == data.ctypes.data
    assert memory.address % 2**21 == 0
    assert not data.any()
    data[:] = 1
    assert data.sum() == num_bytes


def test_an_array_keeps_its_memory() -> None:
    data = _native.HostMemory(1 << 20).array()
    gc.collect()
    data[:] = 3
    assert np.array_equal(data, np.full(1 << 20, 3, np.uint8))


def test_bad_sizes_are_refused_by_value() -> None:
    with pytest.raises(ValueError, match="num_bytes is -1"):
        _native.HostMemory(-1)
    with pytest.raises(MemoryError, match=str(2**60)):
        _native.HostMemory(2**60)
    with pytest.raises(ValueError, match="touch_cpus holds CPU 8191"):
        _native.HostMemory(1, touch_cpus=[8191])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_layout_goes_there_and_back(dtype: torch.dtype) -> None:
    kv_N2KPD = torch.randn(5, 2, 3, 16, 80).to(dtype)
    kv_NK2X = to_host_layout(kv_N2KPD)
    assert kv_NK2X.shape == (5, 3, 2, 16 * 80)
    torch.testing.assert_close(from_host_layout(kv_NK2X, 80), kv_N2KPD, rtol=0, atol=0)


def test_the_host_layout_is_what_the_header_says() -> None:
    kv_N2KPD = torch.arange(2 * 2 * 3 * 16 * 64, dtype=torch.int32).to(torch.float32).view(2, 2, 3, 16, 64)
    block, head, token, dim = 1, 2, 13, 5
    k, v = kv_N2KPD[block, :, head, token, dim]
    full = to_host_layout(kv_N2KPD)
    assert full[block, head, 0, token * 64 + dim] == k
    assert full[block, head, 1, token * 64 + dim] == v
    halves = to_host_layout((kv_N2KPD % 255).to(torch.bfloat16))
    assert halves[block, head, 0, token * 64 + dim] == k % 255
    assert halves[block, head, 1, (token // 2 * 64 + dim) * 2 + token % 2] == v % 255


def test_layouts_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 5, 6\]"):
        to_host_layout(torch.zeros(2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match=r"torch\.int32"):
        to_host_layout(torch.zeros(1, 2, 1, 16, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="D = 80"):
        from_host_layout(torch.zeros(1, 1, 2, 16 * 64), 80)


def test_a_strided_pool_is_refused(pool: _native.WorkerPool) -> None:
    kv_LNK2X = allocate_host_kv(
        num_layers=2, num_blocks=2, num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="contiguous"):
        host_attention(pool, kv_LNK2X[:, :1], num_query_heads=1, head_dim=64)
