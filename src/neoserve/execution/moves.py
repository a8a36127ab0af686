"""Which laps must wait for the migrations of their iteration; all others run beside the copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neoserve.core.plan import Migration, Rows, SubBatch, Tier
from neoserve.device.base import Completion, Device


class Moves:
    """The migrations of one iteration, on their way.

    A row touches a migration when it is of the sequence that moves, or when its blocks were that sequence's before:
    the copy still reads them.
    """

    def __init__(self, migrations: Sequence[Migration], copied: Completion) -> None:
        self._copied = copied
        self._moving = {migration.request_id for migration in migrations}
        self._left: dict[Tier, set[int]] = {Tier.DEVICE: set(), Tier.HOST: set()}
        for migration in migrations:
            self._left[migration.source].update(migration.source_block_ids.tolist())

    def hold(self, device: Device, sub_batch: SubBatch) -> None:
        """On the stream, before a lap: make those of its rows wait that touch a migration.

        HOST prompts need not: their own copies follow the migrations.
        """
        on_device = [rows for rows in sub_batch.prefill if rows.tier is Tier.DEVICE]
        if self._touch([*on_device, *sub_batch.device_decode], Tier.DEVICE):
            device.wait_for(self._copied)
        if self._touch(sub_batch.host_decode, Tier.HOST):
            device.hold_exchanges(sub_batch.index, self._copied)

    def _touch(self, rows: Iterable[Rows], tier: Tier) -> bool:
        left = self._left[tier]
        return any(r.request_id in self._moving or not left.isdisjoint(r.block_ids.tolist()) for r in rows)
