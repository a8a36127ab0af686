"""The memory of both KV tiers and of the staging area, and the copies between them.

Shape letters: L layers, N blocks, K kv heads, P tokens per block, D head dim, X = 2KPD values of a host block.
"""

from __future__ import annotations

import numpy as np
import torch

from neoserve import _native
from neoserve.core.config import ResolvedConfig
from neoserve.core.plan import Migration, Tier
from neoserve.device.base import Device


class KVStore:
    """Both pools as tensors.

    device_LN2KPD: the device pool; its last block belongs to no one and takes the writes of padding rows.
    staging_LN2KPD: two one-layer areas, used by even and odd layers in turn, in which prompts of HOST sequences attend.
    host_LNX: the host pool, in the layout of csrc/attention/attention.h; empty without a host tier.
    """

    def __init__(self, config: ResolvedConfig, device: Device) -> None:
        shape = config.shape
        dtype: torch.dtype = getattr(torch, config.dtype)
        block = (2, shape.num_kv_heads, config.block_size, shape.head_dim)
        self._device = device
        self.device_LN2KPD = torch.zeros(
            (shape.num_layers, config.device_blocks + 1, *block), dtype=dtype, device=device.torch_device
        )
        self.staging_LN2KPD = torch.zeros((2, config.staging_blocks, *block), dtype=dtype, device=device.torch_device)
        block_values = int(np.prod(block))
        num_values = shape.num_layers * config.host_blocks * block_values
        self._host_memory = _native.HostMemory(max(1, num_values * dtype.itemsize))
        if config.host_blocks:
            device.register(self._host_memory.address, self._host_memory.num_bytes)
        host = torch.from_numpy(self._host_memory.array())[: num_values * dtype.itemsize].view(dtype)
        self.host_LNX = host.view(shape.num_layers, config.host_blocks, block_values)

    @property
    def host_address(self) -> int:
        """Where the host pool begins."""
        return self._host_memory.address

    def migrate(self, migration: Migration) -> None:
        """Enqueue the copy of one sequence's blocks, all layers, to the other tier."""
        source = self._device.upload(np.asarray(migration.source_block_ids, dtype=np.int64))
        target = self._device.upload(np.asarray(migration.target_block_ids, dtype=np.int64))
        if migration.source is Tier.DEVICE:
            self._device.ops.blocks_to_host(self.device_LN2KPD, source, self.host_LNX, target)
        else:
            self._device.ops.blocks_from_host(self.host_LNX, source, self.device_LN2KPD, target)

    def staging(self, layer: int) -> torch.Tensor:
        """The staging area that `layer` uses, kv_N2KPD."""
        return self.staging_LN2KPD[layer % 2]

    def load_staging(self, layer: int, host_block_ids: torch.Tensor, staging_block_ids: torch.Tensor) -> None:
        """Bring one layer of earlier chunks' KV to the staging area."""
        area = self.staging_LN2KPD[layer % 2].unsqueeze(0)
        host = self.host_LNX[layer : layer + 1]
        self._device.ops.blocks_from_host(host, host_block_ids, area, staging_block_ids)

    def store_staging(self, layer: int, staging_block_ids: torch.Tensor, host_block_ids: torch.Tensor) -> None:
        """Take one layer of a chunk's KV from the staging area to the host pool."""
        area = self.staging_LN2KPD[layer % 2].unsqueeze(0)
        host = self.host_LNX[layer : layer + 1]
        self._device.ops.blocks_to_host(area, staging_block_ids, host, host_block_ids)
