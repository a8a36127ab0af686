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

from neoserve.core.config import ResolvedConfig, transfer_blocks
from neoserve.core.errors import HostMemoryError
from neoserve.core.plan import Migration, Tier
from neoserve.device.base import BlockTransfer, Completion, Device, LayerCopies
from neoserve.kernels.host_attention import allocate_host_kv


class KVStore:
    """Both pools as tensors.

    device_LN2KPD: the device pool; its last block, `padding_block`, takes the writes of rows that belong to no one.
    staging_LN2KPD: two one-layer areas, used by even and odd layers in turn, in which prompts of HOST sequences attend.
    transfer_NX: a buffer for what passes between those and the host pool, in the layout of the latter.
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
            device.register(self.host_LNX.data_ptr(), self.host_LNX.nbytes, whole_bytes=self.host_LNX[0].nbytes)
        self.device_LN2KPD = torch.zeros(
            (shape.num_layers, config.device_blocks + 1, *block), dtype=dtype, device=device.torch_device
        )
        self.staging_LN2KPD = torch.zeros((2, config.staging_blocks, *block), dtype=dtype, device=device.torch_device)
        self.transfer_NX = torch.empty(
            (transfer_blocks(config.staging_blocks), self.staging_LN2KPD[0, :1].numel()),
            dtype=dtype,
            device=device.torch_device,
        )
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
        to_host = migration.source is Tier.DEVICE
        block_ids, host_block_ids = (source, target) if to_host else (target, source)
        pools = (self.device_LN2KPD, block_ids, self.host_LNX, host_block_ids)
        self._device.ops.block_copies(*pools, to_host=to_host).run(0, 0, self.num_layers)

    def staging_area(self, layer: int) -> int:
        """Which staging area `layer` uses."""
        return layer % 2

    def wait_for_area(self, layer: int) -> None:
        """On the stream: later work waits until what the area's last layer left there has been stored."""
        stored = self._stored[(layer - 2) % 4]
        if stored is not None:
            self._device.wait_for(stored)

    def staging_copies(
        self, staging_block_ids: np.ndarray, host_block_ids: np.ndarray, *, to_host: bool
    ) -> LayerCopies:
        """On the stream: of blocks (int64) between the staging areas and the host pool, for the two methods below."""
        pools = self.staging_LN2KPD, staging_block_ids, self.host_LNX, host_block_ids
        return self._device.layer_copies(BlockTransfer(*pools, self.transfer_NX, to_host))

    def load_staging(self, layer: int, copies: LayerCopies) -> Completion:
        """Submit: bring one layer of earlier chunks' KV to its area."""
        return copies.submit(self.staging_area(layer), layer)

    def store_staging(self, layer: int, copies: LayerCopies) -> None:
        """Submit: take one layer of a chunk's KV from its area to the host pool."""
        stored = copies.submit(self.staging_area(layer), layer)
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
