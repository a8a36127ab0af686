"""A lap's rows as index arrays: pure NumPy, made by the caller before anything is enqueued.

Rows lie in the order prefill of DEVICE sequences, prefill of HOST sequences, device decode, host decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neoserve.core.plan import Rows, SubBatch, Tier
from neoserve.device.base import PagedBatch


@dataclass(frozen=True, slots=True)
class StagingCopies:
    """Block ids, int64, of the copies around a lap's HOST prefill: earlier chunks' blocks in, this chunk's out.

    What sub-batch 0 has just computed of a chunk that continues in sub-batch 1 lies in the staging area already.
    """

    load_host: np.ndarray
    load_staging: np.ndarray
    store_host: np.ndarray
    store_staging: np.ndarray


@dataclass(frozen=True, slots=True)
class LapInputs:
    """Everything that one lap's stages index with.

    indices: int64, one after another: token ids [num_prefill rows], positions [num_rows], slots of the decode rows,
        sampling rows' indices. One upload brings them all.
    device_prefill, host_prefill, device_decode: slices of the rows, with their paged batches (`None` when empty).
    host_decode: slice of the host rows.
    """

    indices: np.ndarray
    num_rows: int
    num_prefill_rows: int
    device_prefill: tuple[slice, PagedBatch] | None
    host_prefill: tuple[slice, PagedBatch] | None
    device_decode: tuple[slice, PagedBatch] | None
    host_decode: slice
    staging: StagingCopies | None
    sampling: tuple[Rows, ...]


def _paged(rows: Sequence[Rows], tables: Sequence[np.ndarray], first_row: int) -> tuple[slice, PagedBatch] | None:
    if not rows:
        return None
    batch = PagedBatch(
        row_start=np.cumsum([0, *(r.count for r in rows)], dtype=np.int32),
        block_start=np.cumsum([0, *map(len, tables)], dtype=np.int32),
        block_ids=np.concatenate(tables),
        lengths=np.array([r.length for r in rows], dtype=np.int32),
    )
    return slice(first_row, first_row + batch.num_rows), batch


def _staging_copies(rows: Sequence[Rows], block_size: int) -> StagingCopies | None:
    if not rows:
        return None
    kept = [slice(0, 0 if r.continues else -(-r.start // block_size)) for r in rows]
    written = [slice(r.start // block_size, None) for r in rows]
    host = [np.asarray(r.block_ids, dtype=np.int64) for r in rows]
    staging = [np.asarray(r.staging_block_ids, dtype=np.int64) for r in rows]

    def part(tables: Sequence[np.ndarray], slices: Sequence[slice]) -> np.ndarray:
        return np.concatenate([table[which] for table, which in zip(tables, slices, strict=True)])

    return StagingCopies(part(host, kept), part(staging, kept), part(host, written), part(staging, written))


def lap_inputs(sub_batch: SubBatch, block_size: int) -> LapInputs:
    """The index arrays of a lap. Raises nothing: a plan that does not fit together is a bug, asserted here."""
    on_device = [r for r in sub_batch.prefill if r.tier is Tier.DEVICE]
    on_host = [r for r in sub_batch.prefill if r.tier is Tier.HOST]
    assert tuple(on_device + on_host) == sub_batch.prefill, "DEVICE prefill comes before HOST prefill"
    decodes = sub_batch.device_decode + sub_batch.host_decode
    assert all(r.count == 1 for r in decodes), "a decode is one row"
    token_ids = [token for r in sub_batch.prefill for token in r.token_ids or ()]
    num_prefill_rows = len(token_ids)
    num_rows = num_prefill_rows + len(decodes)
    last_rows = np.cumsum([r.count for r in sub_batch.rows], dtype=np.int64) - 1
    sampling = [(row, r) for row, r in zip(last_rows, sub_batch.rows, strict=True) if r.samples]
    positions = [np.arange(r.start, r.length, dtype=np.int64) for r in sub_batch.prefill]
    indices = np.concatenate(
        [
            np.array(token_ids, dtype=np.int64),
            *positions,
            np.array([r.start for r in decodes], dtype=np.int64),
            np.array([r.slot for r in decodes], dtype=np.int64),
            np.array([row for row, _ in sampling], dtype=np.int64),
        ]
    )
    first_host_row = sum(r.count for r in on_device)
    return LapInputs(
        indices=indices,
        num_rows=num_rows,
        num_prefill_rows=num_prefill_rows,
        device_prefill=_paged(on_device, [r.block_ids for r in on_device], 0),
        host_prefill=_paged(on_host, [np.array(r.staging_block_ids, dtype=np.int32) for r in on_host], first_host_row),
        device_decode=_paged(sub_batch.device_decode, [r.block_ids for r in sub_batch.device_decode], num_prefill_rows),
        host_decode=slice(num_rows - len(sub_batch.host_decode), num_rows),
        staging=_staging_copies(on_host, block_size),
        sampling=tuple(r for _, r in sampling),
    )
