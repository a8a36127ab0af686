"""The memory of both KV tiers and of the staging area, and the copies between them.

Copies run beside the compute stream, after all that was enqueued when they were submitted, and in order among
themselves. Whoever touches what a copy reads or writes waits for it; an iteration waits for the copies of all earlier
ones (`earlier_copies`).

Shape letters: L layers, N blocks, K kv heads, P tokens per block, D head dim, X = 2KPD values of a host block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import HostMemoryError
from neoserve.core.plan import Migration, Tier
from neoserve.device.base import Completion, Device
from neoserve.kernels.host_attention import allocate_host_kv


class KVStore:
    """Both pools as tensors.

    device_LN2KPD: the device pool; its last block, `padding_block`, takes the writes of rows that belong to no one.
    staging_LN2KPD: two one-layer areas, used by even and odd layers in turn, in which prompts of HOST sequences attend.
    host_LNX: the host pool, in the layout of csrc/attention/attention.h; empty without a host tier.

    Raises `HostMemoryError` when the system does not give the host pool, or does not let the device reach it.
    """

    def __init__(self, config: ResolvedConfig, device: Device) -> None:
        shape = config.shape
        dtype: torch.dtype = getattr(torch, config.dtype)
        block = (2, shape.num_kv_heads, config.block_size, shape.head_dim)
        self._device = device
        self.num_layers = shape.num_layers
        self.padding_block = config.device_blocks
        self.host_LNX = _host_pool(config, dtype).flatten(2)
        if config.host_blocks:
            device.register(self.host_LNX.data_ptr(), self.host_LNX.nbytes)
        self.device_LN2KPD = torch.zeros(
            (shape.num_layers, config.device_blocks + 1, *block), dtype=dtype, device=device.torch_device
        )
        self.staging_LN2KPD = torch.zeros((2, config.staging_blocks, *block), dtype=dtype, device=device.torch_device)
        # Views of a layer of the host pool and of an area, which copies of staged prompts take at every layer.
        self._host_1NX = self.host_LNX.split(1)
        self._areas_1N2KPD = self.staging_LN2KPD.split(1)
        self._last_copy: Completion | None = None
        self._stored: list[Completion | None] = [None] * 4  # of the latest layers, by layer modulo 4

    def earlier_copies(self) -> Completion | None:
        """The last copy submitted since the last call, `None` without one; all others are done before it."""
        copies, self._last_copy = self._last_copy, None
        return copies

    def migrate(self, migrations: Sequence[Migration]) -> Completion:
        """Submit the copies of sequences' blocks, all layers, to their other tier."""

        def work() -> None:
            for migration in migrations:
                self._migrate(migration)

        self._last_copy = self._device.submit_copies(work)
        return self._last_copy

    def _migrate(self, migration: Migration) -> None:
        source = self._device.upload(np.asarray(migration.source_block_ids, dtype=np.int64))
        target = self._device.upload(np.asarray(migration.target_block_ids, dtype=np.int64))
        if migration.source is Tier.DEVICE:
            self._device.ops.blocks_to_host(self.device_LN2KPD, source, self.host_LNX, target)
        else:
            self._device.ops.blocks_from_host(self.host_LNX, source, self.device_LN2KPD, target)

    def staging(self, layer: int) -> torch.Tensor:
        """The staging area that `layer` uses, kv_N2KPD."""
        return self.staging_LN2KPD[layer % 2]

    def wait_for_area(self, layer: int) -> None:
        """On the stream: later work waits until what the area's last layer left there has been stored."""
        stored = self._stored[(layer - 2) % 4]
        if stored is not None:
            self._device.wait_for(stored)

    def load_staging(self, layer: int, host_block_ids: torch.Tensor, staging_block_ids: torch.Tensor) -> Completion:
        """Submit: bring one layer of earlier chunks' KV to its area."""
        area, host = self._areas_1N2KPD[layer % 2], self._host_1NX[layer]
        copy = self._device.ops.blocks_from_host
        return self._device.submit_copies(lambda: copy(host, host_block_ids, area, staging_block_ids))

    def store_staging(self, layer: int, staging_block_ids: torch.Tensor, host_block_ids: torch.Tensor) -> None:
        """Submit: take one layer of a chunk's KV from its area to the host pool."""
        area, host = self._areas_1N2KPD[layer % 2], self._host_1NX[layer]
        copy = self._device.ops.blocks_to_host
        stored = self._device.submit_copies(lambda: copy(area, staging_block_ids, host, host_block_ids))
        self._last_copy = self._stored[layer % 4] = stored


def _host_pool(config: ResolvedConfig, dtype: torch.dtype) -> torch.Tensor:
    shape = config.shape
    if not config.host_blocks:
        return torch.empty(shape.num_layers, 0, shape.num_kv_heads, 2, config.block_size * shape.head_dim, dtype=dtype)
    try:
        return allocate_host_kv(
            num_layers=shape.num_layers,
            num_blocks=config.host_blocks,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=config.block_size,
            dtype=dtype,
            # A GPU pins the pages, which takes several times as long where they are not there yet.
            touch_cpus=config.worker_cpus if config.device == "cuda" else (),
        )
    except MemoryError as error:
        num_bytes = config.host_blocks * config.block_size * shape.kv_bytes_per_token(config.dtype)
        raise HostMemoryError(
            f"the system does not give {num_bytes / 2**30:.1f} GiB for the host tier ({error}); "
            "ask for less with --host-memory"
        ) from error
