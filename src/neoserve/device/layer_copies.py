"""Blocks between the device and the host pool by the copy engines, which leave the multiprocessors to the model.

A kernel changes the layout between the blocks on the device and a buffer there, in microseconds; a copy takes each run
of consecutive blocks between the buffer and the host pool. Hand-offs of host rows share the copy engines, which take
turns between streams after each copy, so no copy is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from neoserve.device.base import BlockTransfer
from neoserve.device.driver import Driver
from neoserve.kernels.block_copy import MappedCopies

_MOST_BYTES = 2**19
"""Of a copy: behind three of 4 MiB another stream's of 600 KiB takes 200 us, behind such ones 60, alone 20 (H200)."""


class _Copy(NamedTuple):
    """Bytes between an address in the buffer and an offset in a layer of the host pool."""

    buffer_address: int
    host_offset: int
    num_bytes: int


class EngineCopies:
    """As `Device.layer_copies`.

    stream: that it runs on, which is current. for_layers: as `Device.for_layers` for that stream. ids_2N: on the
    device, the blocks there and their places in the buffer.
    """

    def __init__(
        self,
        driver: Driver,
        stream: int,
        for_layers: Callable[[Callable[[torch.Tensor], None], torch.Tensor], Callable[[int], None]],
        transfer: BlockTransfer,
        ids_2N: torch.Tensor,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._host_LNX = transfer.host_LNX
        self._to_host = transfer.to_host
        self._pieces: list[tuple[Callable[[int], None], list[_Copy]]] = []
        buffer_NX, size = transfer.buffer_NX, len(transfer.buffer_NX)
        for start in range(0, len(transfer.host_block_ids), size):
            relayout = partial(_relayout, ids_2N[:, start : start + size], buffer_NX.unsqueeze(0), transfer.to_host)
            copies = list(_copies(transfer.host_block_ids[start : start + size], buffer_NX))
            self._pieces.append((for_layers(relayout, transfer.kv_LN2KPD), copies))

    def run(self, layer: int, host_layer: int) -> None:
        """Copy a layer."""
        host_address = self._host_LNX[host_layer].data_ptr()
        for relayout, copies in self._pieces:
            if self._to_host:
                relayout(layer)
            calls = []
            for buffer_address, host_offset, num_bytes in copies:
                ends = buffer_address, host_address + host_offset
                source, target = ends if self._to_host else reversed(ends)
                calls.append(self._driver.copy(target, source, num_bytes, self._stream))
            self._driver.enqueue(*calls)
            if not self._to_host:
                relayout(layer)


def _relayout(ids_2N: torch.Tensor, buffer_1NX: torch.Tensor, to_host: bool, kv_N2KPD: torch.Tensor) -> None:
    """Between the blocks of one layer on the device and the buffer."""
    MappedCopies(kv_N2KPD.unsqueeze(0), ids_2N[0], buffer_1NX, ids_2N[1], to_host=to_host).run(0, 0)


def _copies(host_block_ids: np.ndarray, buffer_NX: torch.Tensor) -> Iterator[_Copy]:
    """Of blocks that lie side by side in the buffer, one or more for each run of consecutive ids in the host pool."""
    block_bytes = buffer_NX[0].nbytes
    starts = np.flatnonzero(np.diff(host_block_ids, prepend=host_block_ids[0] - 2) != 1).tolist()
    for start, stop in zip(starts, [*starts[1:], len(host_block_ids)], strict=True):
        num_bytes = (stop - start) * block_bytes
        address = buffer_NX.data_ptr() + start * block_bytes
        offset = int(host_block_ids[start]) * block_bytes
        for first in range(0, num_bytes, _MOST_BYTES):
            yield _Copy(address + first, offset + first, min(_MOST_BYTES, num_bytes - first))
