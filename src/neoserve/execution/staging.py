"""Prompts of HOST sequences attend on the device, in an area that holds one layer; their KV passes through it.

Two areas serve even and odd layers in turn. Copies run beside the compute stream, in their own order: while layer i
attends, earlier chunks' KV of layer i + 1 comes in and this chunk's of layer i - 1 goes out. A chunk that is divided
between two sub-batches has its blocks there once: the second part finds what the first has appended.
"""

from __future__ import annotations

from collections.abc import Callable

from neoserve.device.base import Device
from neoserve.execution.inputs import StagingCopies
from neoserve.execution.kv_store import KVStore


class StagedPrefill:
    """Attention of the HOST prompts of one lap, layer after layer. Made and used on the stream.

    attend: appends k and v and attends, in one of the areas.
    """

    def __init__(self, device: Device, store: KVStore, attend: Callable[[int], None], copies: StagingCopies) -> None:
        self._device = device
        self._store = store
        self._attend = attend
        self._loads = store.staging_copies(copies.load_staging, copies.load_host, to_host=False)
        self._stores = store.staging_copies(copies.store_staging, copies.store_host, to_host=True)
        self._loaded = store.load_staging(0, self._loads) if len(copies.load_host) else None

    def attend(self, layer: int) -> None:
        """Append k and v, attend, and let the chunk's KV go to the host."""
        if self._loaded is not None:
            self._device.wait_for(self._loaded)
            if layer + 1 < self._store.num_layers:
                self._loaded = self._store.load_staging(layer + 1, self._loads)
        else:
            self._store.wait_for_area(layer)
        self._attend(self._store.staging_area(layer))
        self._store.store_staging(layer, self._stores)
