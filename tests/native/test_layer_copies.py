"""The calls that copy blocks between the tiers a layer at a time, on the CPU."""

from __future__ import annotations

from ctypes import c_int64, memmove

import numpy as np
import pytest
import torch

from neoserve.device.base import BlockTransfer
from neoserve.device.launches import Launches
from neoserve.device.layer_copies import EngineCopies

from .cpu_driver import STREAM, CpuDriver

LAYERS, HOST_BLOCKS, BLOCKS, VALUES = 5, 200, 130, 4096
RUNS = ((3,), (7, 8), (100, *range(20, 90)), (0, 1, 2), (199,))
HOST_IDS = np.array([block for run in RUNS for block in run], dtype=np.int64)
END = 2**47 + 1


def relayout_kernel(kv: int, buffer: int, ids: int, places: int, block_bytes: int, num_blocks: int) -> None:
    """Blocks to the buffer, or back where `num_blocks` is odd; their layout stays."""
    count, to_host = num_blocks // 2, num_blocks % 2 == 0
    for block, place in zip(*((c_int64 * count).from_address(address) for address in (ids, places)), strict=True):
        ends = buffer + place * block_bytes, kv + block * block_bytes
        memmove(*(ends if to_host else ends[::-1]), block_bytes)


def engine_copies(driver: CpuDriver, transfer: BlockTransfer) -> EngineCopies:
    def relayout(kv_N2KPD: torch.Tensor, ids_2N: torch.Tensor, buffer_NX: torch.Tensor, to_host: bool) -> None:
        ids, places = ids_2N
        pools = kv_N2KPD.data_ptr(), buffer_NX.data_ptr(), ids.data_ptr(), places.data_ptr()
        driver.launch(relayout_kernel, *pools, buffer_NX[0].nbytes, 2 * len(ids) + (not to_host))

    places = np.arange(len(transfer.block_ids)) % len(transfer.buffer_NX)
    ids_2N = torch.from_numpy(np.stack((transfer.block_ids, places)))
    return EngineCopies(driver, Launches(driver), STREAM, relayout, transfer, ids_2N)


@pytest.mark.parametrize("buffer_blocks", [7, 128])
def test_layers_go_to_the_host_pool_and_come_back(buffer_blocks: int) -> None:
    """Runs of blocks, one of them longer than a copy may be, through a buffer that does not hold them all or does."""
    driver = CpuDriver()
    ids = np.random.default_rng(0).permutation(BLOCKS)[: len(HOST_IDS)]
    kv = torch.randn(LAYERS, BLOCKS, VALUES).bfloat16()
    host, back = torch.zeros(LAYERS, HOST_BLOCKS, VALUES).bfloat16(), torch.zeros_like(kv)
    expected = host.clone()
    expected[:, HOST_IDS] = kv[:, ids]
    buffer = torch.empty(buffer_blocks, VALUES).bfloat16()
    out = engine_copies(driver, BlockTransfer(kv, ids, host, HOST_IDS, buffer, to_host=True))
    into = engine_copies(driver, BlockTransfer(back, ids, host, HOST_IDS, buffer, to_host=False))
    assert not driver.log
    for layer in (0, 3, 1, 4, 2):
        out.run(layer, layer, END + layer)
    assert torch.equal(host, expected)
    for layer in (2, 0, 1, 4, 3):
        into.run(layer, layer, END - layer)
    assert torch.equal(back[:, ids], kv[:, ids])
    others = np.setdiff1d(np.arange(BLOCKS), ids)
    assert not back[:, others].any()


def test_a_layer_of_one_pool_goes_to_another_layer_of_the_other() -> None:
    driver, none = CpuDriver(), torch.zeros(LAYERS, 4, VALUES).bfloat16()
    areas, ids = torch.randn(2, 4, VALUES).bfloat16(), np.array([2, 0], dtype=np.int64)
    host = none.clone()
    out = engine_copies(driver, BlockTransfer(areas, ids, host, np.array([1, 3]), none[0].clone(), to_host=True))
    for layer in range(LAYERS):
        out.run(layer % 2, layer, END)
    assert all(torch.equal(host[layer, [1, 3]], areas[layer % 2, [2, 0]]) for layer in range(LAYERS))
    assert not host[:, [0, 2]].any()


@pytest.mark.parametrize("to_host", [False, True])
def test_the_event_follows_what_the_layout_and_the_bus_take(to_host: bool) -> None:
    """No copy is larger than 512 KiB: hand-offs wait for them."""
    driver = CpuDriver()
    kv, host = torch.zeros(1, 100, VALUES).bfloat16(), torch.zeros(1, 100, VALUES).bfloat16()
    ids, block_bytes = np.arange(100), 2 * VALUES
    copies = engine_copies(driver, BlockTransfer(kv, ids, host, ids, torch.zeros_like(host[0]), to_host))
    for _ in range(2):
        copies.run(0, 0, END)
    layout = [("relayout_kernel",)]
    bus = [("copy", 64 * block_bytes, STREAM), ("copy", 36 * block_bytes, STREAM)]
    assert driver.log == 2 * [*(layout + bus if to_host else bus + layout), ("record", END, STREAM)]


def test_no_blocks_are_an_event() -> None:
    driver, none = CpuDriver(), np.empty(0, dtype=np.int64)
    pool = torch.zeros(1, 1, VALUES)
    engine_copies(driver, BlockTransfer(pool, none, pool, none, pool[0], to_host=True)).run(0, 0, END)
    assert driver.log == [("record", END, STREAM)]
