"""Copies of KV blocks between the device's layout and the host pool's.

A block on the device is [2][K][P][D]; in the host pool it is [K][2][P * D], where V has token pairs interleaved,
[P / 2][D][2] (csrc/attention/attention.h). Both have 2-byte values.

The host pool is registered memory, so one kernel can do the gather, the change of layout and the transfer, of all
layers at once. But it keeps its multiprocessors for as long as the bus takes, and kernels that want all of them, as
FlashAttention 3 and most matrix products do, wait for it. So what moves at every layer beside the model's work is
changed in layout within the device, and crosses the bus by the copy engines (device/layer_copies.py).
Letters: L layers, N blocks, K kv heads, P tokens per block, D head dim, X = 2KPD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from neoserve.kernels.base import BlockCopies
from neoserve.kernels.launcher import Launcher

_BUS_PROGRAMS = 16
"""Of a copy that crosses the bus: they saturate that to the host of an H200."""


@triton.jit(do_not_specialize=["first_layer", "first_host_layer", "num_tasks", "num_blocks"])  # type: ignore[untyped-decorator]
def _copy_blocks(  # type: ignore[no-untyped-def]
    kv_ptr,
    host_ptr,
    block_ids_ptr,
    host_block_ids_ptr,
    first_layer,
    first_host_layer,
    num_tasks,
    num_blocks,
    kv_layer_stride: tl.int64,
    kv_block_stride,
    host_layer_stride: tl.int64,
    host_block_stride,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TO_HOST: tl.constexpr,
):
    """One task is one kv head of one block of one layer: its K tile and its V tile."""
    tile: tl.constexpr = P * D
    flat = tl.arange(0, tile)
    pair = tl.arange(0, P // 2)[:, None]
    lane = tl.arange(0, D)[None, :]
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        head = task % K
        index = (task // K) % num_blocks
        layer = task // (K * num_blocks)
        kv_layer = (first_layer + layer).to(tl.int64)
        host_layer = (first_host_layer + layer).to(tl.int64)
        block = tl.load(block_ids_ptr + index)
        host_block = tl.load(host_block_ids_ptr + index)
        k_tile = kv_ptr + kv_layer * kv_layer_stride + block * kv_block_stride + head * tile
        v_tile = k_tile + K * tile
        host_k_tile = host_ptr + host_layer * host_layer_stride + host_block * host_block_stride + head * 2 * tile
        host_v_words = (host_k_tile + tile).to(tl.pointer_type(tl.int32)) + pair * D + lane
        even_tokens = v_tile + 2 * pair * D + lane
        if TO_HOST:
            k = tl.load(k_tile + flat)
            even = tl.load(even_tokens).to(tl.int32) & 0xFFFF
            odd = tl.load(even_tokens + D).to(tl.int32)
            tl.store(host_k_tile + flat, k)
            tl.store(host_v_words, (odd << 16) | even)
        else:
            k = tl.load(host_k_tile + flat)
            words = tl.load(host_v_words)
            tl.store(k_tile + flat, k)
            tl.store(even_tokens, words.to(tl.int16))
            tl.store(even_tokens + D, (words >> 16).to(tl.int16))


_launcher = Launcher(_copy_blocks, num_warps=4)
_NO_NUMBERS = (0, 0, 0, 0)


@dataclass(eq=False)
class MappedCopies(BlockCopies):
    """`BlockCopies` by a kernel: what all layers have in common is looked up once. The host pool is a CPU tensor over
    memory registered with the device; or on the device, and each program copies one kv head of one block: short ones,
    which no other kernel has to wait for."""

    def __post_init__(self) -> None:
        num_heads, block_size, head_dim = self.kv_LN2KPD.shape[3:]
        self._num_blocks = self.block_ids_N.numel()
        self._num_tasks = self._num_blocks * num_heads
        words = self.kv_LN2KPD.view(torch.int16), self.host_LNX.view(torch.int16)
        self._pools = (*words, self.block_ids_N, self.host_block_ids_N)
        self._strides = (*self.kv_LN2KPD.stride()[:2], *self.host_LNX.stride()[:2])
        self._constants = (num_heads, block_size, head_dim, self.to_host)
        first, *others = self._pools
        self._kernel = _launcher.compiled(first, *others, *_NO_NUMBERS, *self._strides, constants=self._constants)

    def run(self, layer: int, host_layer: int, num_layers: int = 1) -> None:
        num_tasks = num_layers * self._num_tasks
        if num_tasks:
            grid = (num_tasks if self.host_LNX.is_cuda else min(_BUS_PROGRAMS, num_tasks), 1, 1)
            numbers = (layer, host_layer, num_tasks, self._num_blocks)
            self._kernel[grid](*self._pools, *numbers, *self._strides, *self._constants)


def relayout(kv_N2KPD: torch.Tensor, ids_2N: torch.Tensor, buffer_NX: torch.Tensor, to_host: bool) -> None:
    """Within the device: blocks of one layer, ids_2N[0], to the blocks ids_2N[1] of a buffer that has the host pool's
    layout, or back."""
    pools = kv_N2KPD.unsqueeze(0), ids_2N[0], buffer_NX.unsqueeze(0), ids_2N[1]
    MappedCopies(*pools, to_host=to_host).run(0, 0)
