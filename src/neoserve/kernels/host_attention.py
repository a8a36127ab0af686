"""The host tier's KV as torch tensors: its layout, its memory, and the attention that runs over it.

Shape letters: L layers, N blocks, K kv heads, P tokens per block, D head dim, X = P * D elements of one tile.

The device's KV of one layer is `kv_N2KPD`. The host's is `kv_NK2X`: the K tile and the V tile of one head lie side by
side, K row-major as [P, D], V with token pairs interleaved as [P / 2, D, 2] where an element has two bytes, row-major
otherwise (csrc/attention/attention.h says why).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neoserve._native import HostAttention, HostMemory, WorkerPool

HOST_HEAD_DIMS = (64, 80, 96, 128, 256)
HOST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in HOST_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, HOST_DTYPES))}")


def _is_interleaved(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


def to_host_layout(kv_N2KPD: torch.Tensor) -> torch.Tensor:
    """Blocks of one layer in the device's layout as a new contiguous `kv_NK2X` on the same torch device."""
    _check_dtype(kv_N2KPD.dtype)
    num_blocks, two, num_kv_heads, block_size, head_dim = kv_N2KPD.shape
    if two != 2 or block_size % 2:
        raise ValueError(f"kv_N2KPD has shape {list(kv_N2KPD.shape)}; expected [N, 2, K, P, D] with an even P")
    kv_NK2X = kv_N2KPD.new_empty(num_blocks, num_kv_heads, 2, block_size * head_dim)
    _k_tiles(kv_NK2X, head_dim).copy_(kv_N2KPD[:, 0])
    _v_tiles(kv_NK2X, head_dim).copy_(kv_N2KPD[:, 1].unflatten(2, (block_size // 2, 2)))
    return kv_NK2X


def from_host_layout(kv_NK2X: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_host_layout`: blocks of one layer as a new contiguous `kv_N2KPD`."""
    _check_dtype(kv_NK2X.dtype)
    num_blocks, num_kv_heads, two, num_elements = kv_NK2X.shape
    if two != 2 or num_elements % (2 * head_dim):
        raise ValueError(
            f"kv_NK2X has shape {list(kv_NK2X.shape)}; expected [N, K, 2, P * D] with D = {head_dim} and an even P"
        )
    block_size = num_elements // head_dim
    kv_N2KPD = kv_NK2X.new_empty(num_blocks, 2, num_kv_heads, block_size, head_dim)
    kv_N2KPD[:, 0] = _k_tiles(kv_NK2X, head_dim)
    kv_N2KPD[:, 1].unflatten(2, (block_size // 2, 2)).copy_(_v_tiles(kv_NK2X, head_dim))
    return kv_N2KPD


def _k_tiles(kv_NK2X: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The K tiles as a view [N, K, P, D]."""
    num_blocks, num_kv_heads, _, num_elements = kv_NK2X.shape
    return kv_NK2X[:, :, 0].view(num_blocks, num_kv_heads, num_elements // head_dim, head_dim)


def _v_tiles(kv_NK2X: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The V tiles as a view [N, K, P / 2, 2, D]: pairs of tokens, whichever way they lie in memory."""
    num_blocks, num_kv_heads, _, num_elements = kv_NK2X.shape
    num_pairs = num_elements // head_dim // 2
    if _is_interleaved(kv_NK2X.dtype):
        return kv_NK2X[:, :, 1].view(num_blocks, num_kv_heads, num_pairs, head_dim, 2).transpose(3, 4)
    return kv_NK2X[:, :, 1].view(num_blocks, num_kv_heads, num_pairs, 2, head_dim)


def allocate_host_kv(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    touch_cpus: Sequence[int] = (),
) -> torch.Tensor:
    """A zeroed host KV pool `kv_LNK2X` on huge pages, contiguous, freed with the last tensor that shares it.

    With `touch_cpus` its pages are made now, by a thread on each of these CPUs; without, on first use.
    Raises ValueError for a dtype that the host tier has not, MemoryError when the system does not give the memory.
    """
    _check_dtype(dtype)
    shape = (num_layers, num_blocks, num_kv_heads, 2, block_size * head_dim)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = HostMemory(num_bytes, touch_cpus=list(touch_cpus))
    return torch.from_numpy(memory.array()).view(dtype).view(shape)


def host_attention(
    pool: WorkerPool,
    kv_LNK2X: torch.Tensor,
    *,
    num_query_heads: int,
    head_dim: int,
    scale: float | None = None,
    instruction_set: str | None = None,
) -> HostAttention:
    """Decode attention by `pool` over a host KV pool, which the caller keeps alive as long as laps are armed.

    scale: of the scores, head_dim**-0.5 by default. instruction_set: `default_instruction_set()` by default.
    """
    _check_dtype(kv_LNK2X.dtype)
    if not kv_LNK2X.is_contiguous() or kv_LNK2X.device.type != "cpu":
        raise ValueError(
            f"kv_LNK2X is on {kv_LNK2X.device} with strides {kv_LNK2X.stride()}; expected a contiguous CPU tensor"
        )
    num_layers, num_blocks, num_kv_heads, _, num_elements = kv_LNK2X.shape
    return HostAttention(
        pool,
        num_layers=num_layers,
        num_blocks=num_blocks,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=num_elements // head_dim,
        dtype=str(kv_LNK2X.dtype).removeprefix("torch."),
        kv_address=kv_LNK2X.data_ptr(),
        scale=head_dim**-0.5 if scale is None else scale,
        instruction_set=instruction_set,
    )
