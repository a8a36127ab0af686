"""Blocks that move between the tiers a layer at a time, by the copy engines."""

import mmap

import numpy as np
import pytest
import torch

from neoserve.device.base import BlockTransfer, Copy
from neoserve.device.cuda import CudaDevice
from neoserve.kernels.flashinfer_ops import FlashInferOps

LAYERS, HOST_BLOCKS, BLOCKS, HEADS, HEAD_DIM = 5, 200, 130, 2, 64
RUNS = ((3,), (7, 8), (100, *range(20, 110 - 20)), (0, 1, 2), (199,))


def host_pool(device: CudaDevice) -> torch.Tensor:
    """As the engine has it: registered, not allocated by torch."""
    values = 2 * HEADS * 16 * HEAD_DIM
    memory = np.frombuffer(mmap.mmap(-1, LAYERS * HOST_BLOCKS * values * 2), dtype=np.int16)
    device.register(memory.ctypes.data, memory.nbytes, whole_bytes=memory.nbytes // LAYERS)
    return torch.from_numpy(memory).view(torch.bfloat16).view(LAYERS, HOST_BLOCKS, values)


@pytest.mark.parametrize("buffer_blocks", [7, 128])
def test_layer_copies_are_those_of_the_kernel(device: CudaDevice, buffer_blocks: int) -> None:
    """Runs of blocks, one of them longer than a copy may be, through a buffer that does not hold them all or does."""
    host_ids = np.array([block for run in RUNS for block in run], dtype=np.int64)
    ids = np.random.default_rng(0).permutation(BLOCKS)[: len(host_ids)]
    gpu = device.torch_device
    areas = torch.randn(2, BLOCKS, 2, HEADS, 16, HEAD_DIM, device=gpu).bfloat16()
    host, back = host_pool(device), torch.zeros_like(areas)
    buffer = torch.empty(buffer_blocks, host.shape[2], dtype=torch.bfloat16, device=gpu)
    expected = torch.zeros_like(host, device="cpu").pin_memory()
    device.synchronise()
    tensors = torch.from_numpy(ids).to(gpu), expected, torch.from_numpy(host_ids).to(gpu)
    out = FlashInferOps.block_copies(areas, *tensors, to_host=True)
    for layer in range(LAYERS):
        out.run(layer % 2, layer)
    device.synchronise()

    def move(kv: torch.Tensor, to_host: bool) -> None:
        copies = device.layer_copies(BlockTransfer(kv, ids, host, host_ids, buffer, to_host))
        for layer in range(LAYERS):
            copied = copies.submit(layer % 2, layer)
        device.wait_for(copied)

    device.submit(lambda: move(areas, to_host=True)).wait()
    assert torch.equal(host, expected)
    device.submit(lambda: move(back, to_host=False)).wait()
    assert torch.equal(back[:, ids], areas[:, ids])
    others = np.setdiff1d(np.arange(BLOCKS), ids)
    assert not back[:, others].any()


def test_no_blocks_are_no_copies(device: CudaDevice) -> None:
    areas = torch.zeros(2, 1, 2, HEADS, 16, HEAD_DIM, device=device.torch_device).bfloat16()
    host, none = host_pool(device), np.empty(0, dtype=np.int64)

    def work() -> None:
        copies = device.layer_copies(BlockTransfer(areas, none, host, none, areas[0].flatten(1), to_host=True))
        device.wait_for(copies.submit(0, 0))

    device.submit(work).wait()


def test_who_watches_is_told_of_each_layer(device: CudaDevice) -> None:
    areas = torch.zeros(2, BLOCKS, 2, HEADS, 16, HEAD_DIM, device=device.torch_device).bfloat16()
    host, ids = host_pool(device), np.arange(20, dtype=np.int64)
    seen: list[Copy] = []

    def work() -> None:
        copies = device.layer_copies(BlockTransfer(areas, ids, host, ids, areas[0].flatten(1), to_host=True))
        for layer in range(3):
            device.on_copy = seen.append if layer else None
            device.wait_for(copies.submit(layer % 2, layer))
        device.on_copy = None

    device.submit(work).wait()
    assert [(copy.what, copy.channel) for copy in seen] == [("tiers", None)] * 2
    times_ns = device.times_ns([mark for copy in seen for mark in (copy.begin, copy.end)])
    assert times_ns == sorted(set(times_ns))
