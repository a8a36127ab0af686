"""The index arrays of a `PagedBatch` side by side in one buffer, so that one copy brings them to the device.

Each array begins at a multiple of 16 bytes. Block ids come last: a buffer that is kept for the largest batch is
filled with a prefix. All values are int32. Letters: B sequences, T rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neoserve.kernels.base import PagedBatch

_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class PagedArrays:
    """Views into one buffer, on the host or on the device.

    row_start, block_start: [B + 1]. lengths: [B]. last_block_tokens: [B], tokens in each sequence's last block.
    row_sequences, row_positions: [T], each row's sequence and its position in it. block_ids: [number of blocks].
    """

    row_start: torch.Tensor
    block_start: torch.Tensor
    lengths: torch.Tensor
    last_block_tokens: torch.Tensor
    row_sequences: torch.Tensor
    row_positions: torch.Tensor
    block_ids: torch.Tensor


def aligned_spans(sizes: Iterable[int]) -> Iterator[slice]:
    """Where arrays of these sizes lie in a buffer of int32."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += -(-size // _ALIGNMENT) * _ALIGNMENT


def _spans(num_sequences: int, num_rows: int, num_blocks: int) -> Iterator[slice]:
    b, t = num_sequences, num_rows
    return aligned_spans((b + 1, b + 1, b, b, t, t, num_blocks))


def buffer_size(num_sequences: int, num_rows: int, num_blocks: int) -> int:
    """int32 values that the arrays take."""
    *_, last = _spans(num_sequences, num_rows, num_blocks)
    return int(last.stop)


def views(buffer: torch.Tensor, num_sequences: int, num_rows: int, num_blocks: int) -> PagedArrays:
    """The arrays of a batch of these sizes in `buffer`, which has at least `buffer_size` values."""
    return PagedArrays(*(buffer[span] for span in _spans(num_sequences, num_rows, num_blocks)))


def fill(arrays: PagedArrays, batch: PagedBatch, block_size: int) -> None:
    """Write a batch into host arrays of its sizes."""
    counts = np.diff(batch.row_start)
    first_position = batch.lengths - counts - batch.row_start[:-1]
    arrays.row_start.numpy()[:] = batch.row_start
    arrays.block_start.numpy()[:] = batch.block_start
    arrays.lengths.numpy()[:] = batch.lengths
    arrays.last_block_tokens.numpy()[:] = (batch.lengths - 1) % block_size + 1
    arrays.row_sequences.numpy()[:] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    arrays.row_positions.numpy()[:] = np.arange(batch.num_rows, dtype=np.int32) + np.repeat(first_position, counts)
    arrays.block_ids.numpy()[:] = batch.block_ids


def bucket_size(sizes: Sequence[int], num_sequences: int) -> int:
    """The smallest of the growing `sizes` that `num_sequences` fit in; raises ValueError when none does."""
    index = bisect_left(sizes, num_sequences)
    if index == len(sizes):
        raise ValueError(f"{num_sequences} sequences; the largest bucket is {sizes[-1]}")
    return sizes[index]


def pad_decode(batch: PagedBatch, num_sequences: int, padding_block: int) -> PagedBatch:
    """A decode batch of `num_sequences`: those added have one token, in `padding_block`, which belongs to no one."""
    missing = num_sequences - batch.num_sequences
    if missing < 0:
        raise ValueError(f"{batch.num_sequences} sequences do not fit a bucket of {num_sequences}")
    steps = np.arange(1, missing + 1, dtype=np.int32)
    return PagedBatch(
        row_start=np.arange(num_sequences + 1, dtype=np.int32),
        block_start=np.concatenate([batch.block_start, batch.block_start[-1] + steps]),
        block_ids=np.concatenate([batch.block_ids, np.full(missing, padding_block, dtype=np.int32)]),
        lengths=np.concatenate([batch.lengths, np.ones(missing, dtype=np.int32)]),
    )
