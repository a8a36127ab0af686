"""The hand-off: q, k, v of a sub-batch's host rows to the worker pool, attention output back.

Each sub-batch has one slot each way in memory that host and device share, and two flags whose values only grow:
`ready` counts the layers sent, `done` the layers attended. Workers are armed, in the program's order, before
anything is enqueued; afterwards the device and the workers meet without Python.

Shape letters: T host rows, C = H + 2K heads of a fused qkv row, H query heads, D head dim.
"""

from __future__ import annotations

import numpy as np
import torch

from neoserve import _native
from neoserve.core.config import ResolvedConfig
from neoserve.core.plan import Rows
from neoserve.device.base import Device, Exchange, Flag, Transfer

FLAG_WORDS = 64
"""32-bit words between two flags: far enough that no two share a cache line or its prefetched neighbour."""


class HandOff:
    """One sub-batch's hand-off. `begin`, `arm` and `recover` belong to the caller, `send` to the stream.

    channel: the sub-batch's index.
    """

    def __init__(self, device: Device, attention: _native.HostAttention, config: ResolvedConfig, channel: int) -> None:
        shape, dtype = config.shape, getattr(torch, config.dtype)
        heads = shape.num_query_heads + 2 * shape.num_kv_heads
        self._device = device
        self._channel = channel
        self._attention = attention
        self._qkv_TCD = device.pinned((config.max_num_seqs, heads, shape.head_dim), dtype)
        self._out_THD = device.pinned((config.max_num_seqs, shape.num_query_heads, shape.head_dim), dtype)
        self._flags = device.pinned((2 * FLAG_WORDS,), torch.int32)
        self._ready = Flag(self._flags.data_ptr())
        self._done = Flag(self._flags.data_ptr() + 4 * FLAG_WORDS)
        self._num_armed = 0
        self._num_sent = 0

    def begin(self, rows: tuple[Rows, ...]) -> _native.Lap:
        """Split the host rows of a lap over the workers."""
        tables = [r.block_ids for r in rows]
        return self._attention.plan(
            np.array([r.length for r in rows], dtype=np.int32),
            np.cumsum([0, *map(len, tables)], dtype=np.int32),
            np.concatenate(tables),
            qkv_address=self._qkv_TCD.data_ptr(),
            out_address=self._out_THD.data_ptr(),
        )

    def arm(self, lap: _native.Lap, layer: int) -> None:
        """Queue one layer of the lap for the workers."""
        self._num_armed += 1
        self._attention.arm(
            lap,
            layer,
            ready=self._ready.address,
            ready_value=self._num_armed,
            done=self._done.address,
            done_value=self._num_armed,
        )

    def exchange(self, qkv_TCD: torch.Tensor, attn_THD: torch.Tensor) -> Exchange:
        """What `send` sends: these rows to the slot in one copy, and the output of the workers to `attn_THD`."""
        return self._device.exchange(
            self._channel,
            outward=Transfer(qkv_TCD, self._qkv_TCD[: len(qkv_TCD)]),
            ready=self._ready,
            done=self._done,
            back=Transfer(self._out_THD[: len(attn_THD)], attn_THD),
        )

    def send(self, exchange: Exchange) -> None:
        """Enqueue the next of the layers that were armed."""
        self._num_sent += 1
        exchange.begin(self._num_sent)

    def recover(self, timeout_s: float) -> bool:
        """After an iteration that broke off: let the workers finish what was armed and never sent.

        Returns whether they did within the time. The stream must be idle.
        """
        _native.flag_raise(self._ready.address, self._num_armed)
        self._num_sent = self._num_armed
        return _native.flag_wait(self._done.address, self._num_armed, timeout_s)
