"""Blocks between the device and the host pool by the copy engines, which leave the multiprocessors to the model.

A kernel changes the layout between the blocks on the device and a buffer there, in microseconds; a copy takes each run
of consecutive blocks between the buffer and the host pool. Hand-offs of host rows share the copy engines, which take
turns between streams after each copy, so no copy is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from neoserve._native import DriverCalls
from neoserve.device.base import BlockTransfer
from neoserve.device.driver import Call, Driver
from neoserve.device.launches import Launches

_MOST_BYTES = 2**19
"""Of a copy: behind three of 4 MiB another stream's of 600 KiB takes 200 us, behind such ones 60, alone 20 (H200)."""


_END, _LAYER, _HOST_LAYER = range(3)
"""What the calls of a layer move by: the event at its end, and bytes from layer 0 in either pool."""

Relayout = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
"""Enqueues a kernel on the current stream, which changes the layout between blocks of a layer on the device and the
buffer: kv_N2KPD, ids_2N, buffer_NX, to_host. ids_2N: on the device, the blocks there and their places in the buffer."""


class EngineCopies:
    """Copies of the same blocks, one layer at a time, each by one native call.

    stream: for all of it; it is current when this is made. ids_2N: as `Relayout` has it.
    """

    def __init__(
        self,
        driver: Driver,
        launches: Launches,
        stream: int,
        relayout: Relayout,
        transfer: BlockTransfer,
        ids_2N: torch.Tensor,
    ) -> None:
        self._driver = driver
        self._layer_bytes = transfer.kv_LN2KPD.stride(0) * transfer.kv_LN2KPD.element_size()
        self._host_layer_bytes = transfer.host_LNX.stride(0) * transfer.host_LNX.element_size()
        self._kept: list[object] = [transfer, ids_2N]
        kv_N2KPD, host_NX, buffer_NX = transfer.kv_LN2KPD[0], transfer.host_LNX[0], transfer.buffer_NX
        memory = range(kv_N2KPD.data_ptr(), kv_N2KPD.data_ptr() + kv_N2KPD.nbytes)
        to_host = transfer.to_host
        calls: list[Call] = []
        words: list[tuple[int, int]] = []
        arguments: list[tuple[int, int, int]] = []
        for start in range(0, len(transfer.host_block_ids), len(buffer_NX)):
            piece = slice(start, start + len(buffer_NX))
            work = partial(relayout, kv_N2KPD, ids_2N[:, piece], buffer_NX, to_host)
            kernels = launches.kernels(work, memory, stream)
            assert kernels is not None, "it is a kernel"
            self._kept.append(kernels.kept)
            words += [(word, _LAYER) for word in kernels.words]
            copies = [
                driver.copy(*((host, buffer) if to_host else (buffer, host)), num_bytes, stream)
                for buffer, host, num_bytes in _copies(transfer.host_block_ids[piece], buffer_NX, host_NX)
            ]
            first_copy = len(calls) + (len(kernels.calls) if to_host else 0)
            arguments += [(first_copy + index, 0 if to_host else 1, _HOST_LAYER) for index in range(len(copies))]
            calls += [*kernels.calls, *copies] if to_host else [*copies, *kernels.calls]
        arguments.append((len(calls), 0, _END))
        calls.append(driver.record_event(0, stream))
        self._calls = DriverCalls(calls, words, arguments)

    def run(self, layer: int, host_layer: int, end: int) -> None:
        """Copy a layer of the device's to or from one of the host pool, and record the event `end`."""
        self._driver.run(self._calls, end, layer * self._layer_bytes, host_layer * self._host_layer_bytes)


def _copies(
    host_block_ids: np.ndarray, buffer_NX: torch.Tensor, host_NX: torch.Tensor
) -> Iterator[tuple[int, int, int]]:
    """Of blocks that lie side by side in the buffer, one or more for each run of consecutive ids in the host pool: the
    addresses in both, and bytes."""
    block_bytes = buffer_NX[0].nbytes
    starts = np.flatnonzero(np.diff(host_block_ids, prepend=host_block_ids[0] - 2) != 1).tolist()
    for start, stop in zip(starts, [*starts[1:], len(host_block_ids)], strict=True):
        num_bytes = (stop - start) * block_bytes
        address = buffer_NX.data_ptr() + start * block_bytes
        host_address = host_NX.data_ptr() + int(host_block_ids[start]) * block_bytes
        for first in range(0, num_bytes, _MOST_BYTES):
            yield address + first, host_address + first, min(_MOST_BYTES, num_bytes - first)
