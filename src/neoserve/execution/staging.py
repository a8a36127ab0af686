"""Prompts of HOST sequences attend on the device, in an area that holds one layer; their KV passes through it.

Two areas serve even and odd layers in turn. Copies run beside the compute stream, in their own order: while layer i
attends, earlier chunks' KV of layer i + 1 comes in and this chunk's of layer i - 1 goes out. A chunk that is divided
between two sub-batches has its blocks there once: the second part finds what the first has appended.
"""

from __future__ import annotations

import torch

from neoserve.device.base import Completion, Device, PagedAttention
from neoserve.execution.inputs import StagingCopies
from neoserve.execution.kv_store import KVStore


class StagedPrefill:
    """Attention of the HOST prompts of one lap, layer after layer. Made and used on the stream."""

    def __init__(self, device: Device, store: KVStore, attention: PagedAttention, copies: StagingCopies) -> None:
        self._device = device
        self._store = store
        self._attention = attention
        self._load_host, self._load_staging, self._store_host, self._store_staging = map(
            device.upload, (copies.load_host, copies.load_staging, copies.store_host, copies.store_staging)
        )
        self._loaded: Completion | None = None
        if len(self._load_host):
            self._load(0)

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, out_THD: torch.Tensor
    ) -> None:
        """Append k and v, attend into `out_THD`, and let the chunk's KV go to the host."""
        if self._loaded is not None:
            self._device.wait_for(self._loaded)
            if layer + 1 < self._store.num_layers:
                self._load(layer + 1)
        else:
            self._store.wait_for_area(layer)
        area = self._store.staging(layer)
        self._attention.run(q_THD, k_TKD, v_TKD, area, out_THD)
        self._store.store_staging(layer, self._store_staging, self._store_host)

    def _load(self, layer: int) -> None:
        self._loaded = self._store.load_staging(layer, self._load_host, self._load_staging)
