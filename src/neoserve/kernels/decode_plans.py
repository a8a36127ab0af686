"""Plans of decode attention: how sequences are cut into chunks, and chunks dealt to programs, for `decode_attention`.

Letters: B sequences, C chunks, W programs of a kv head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.paged_arrays import aligned_spans, pad_decode

TILE_TOKENS = 64
"""Tokens that shares are measured in."""


@dataclass(frozen=True, slots=True)
class DecodeArrays:
    """A plan: views into one int32 buffer, on the host or on the device.

    program_chunk: [W + 1], cumulative number of chunks of each program. chunk_start: [B + 1], of each sequence.
    chunk_sequence, chunk_first, chunk_stop: [C], each chunk's sequence, and which of its cached tokens the chunk is; C
    is the most that there can be, W + B. block_start: [B + 1], cumulative number of blocks. lengths: [B]. block_ids:
    [number of blocks]. They lie in this order, so that a buffer that is kept for the largest batch is filled with a
    prefix.
    """

    program_chunk: torch.Tensor
    chunk_start: torch.Tensor
    chunk_sequence: torch.Tensor
    chunk_first: torch.Tensor
    chunk_stop: torch.Tensor
    block_start: torch.Tensor
    lengths: torch.Tensor
    block_ids: torch.Tensor

    @property
    def num_programs(self) -> int:
        return len(self.program_chunk) - 1


def buffer_size(num_sequences: int, num_programs: int, num_blocks: int) -> int:
    """int32 values that a plan takes."""
    return int(_spans(num_sequences, num_programs, num_blocks)[-1].stop)


def views(buffer: torch.Tensor, num_sequences: int, num_programs: int, num_blocks: int) -> DecodeArrays:
    """The arrays of a plan of these sizes in `buffer`, which has at least `buffer_size` values."""
    return DecodeArrays(*(buffer[span] for span in _spans(num_sequences, num_programs, num_blocks)))


def _spans(num_sequences: int, num_programs: int, num_blocks: int) -> tuple[slice, ...]:
    b, w, c = num_sequences, num_programs, num_sequences + num_programs
    return tuple(aligned_spans((w + 1, b + 1, c, c, c, b + 1, b, num_blocks)))


def planned(batch: PagedBatch, num_programs: int, device: torch.device) -> DecodeArrays:
    """A decode batch's plan on the device, in memory of its own, by one copy on the current stream."""
    sizes = (batch.num_sequences, num_programs, len(batch.block_ids))
    return views(_pinned(batch, num_programs).to(device, non_blocking=True), *sizes)


class DecodePlanBuffer:
    """Memory on the device in which plans of up to `most_sequences` are made again and again, a prefix of one buffer
    each: a plan overwrites the one before, in stream order.

    max_blocks: of all sequences of a batch together, padding included.
    """

    def __init__(
        self, most_sequences: int, num_programs: int, max_blocks: int, padding_block: int, device: torch.device
    ) -> None:
        self._num_programs = num_programs
        self._max_blocks = max_blocks
        self._padding_block = padding_block
        largest = buffer_size(most_sequences, num_programs, max_blocks)
        self._buffer = torch.zeros(largest, dtype=torch.int32, device=device)

    def arrays(self, num_sequences: int) -> DecodeArrays:
        """Where the plans of so many sequences lie."""
        return views(self._buffer, num_sequences, self._num_programs, self._max_blocks)

    def plan(self, batch: PagedBatch, num_sequences: int) -> None:
        """Plan a batch, filled up to `num_sequences`, on the current stream; raises ValueError if it does not fit."""
        padded = pad_decode(batch, num_sequences, self._padding_block)
        if len(padded.block_ids) > self._max_blocks:
            raise ValueError(f"{len(padded.block_ids)} blocks; the plans hold {self._max_blocks}")
        pinned = _pinned(padded, self._num_programs)
        self._buffer[: len(pinned)].copy_(pinned, non_blocking=True)


def _pinned(batch: PagedBatch, num_programs: int) -> torch.Tensor:
    """The plan of a decode batch, in pinned memory of its own."""
    sizes = (batch.num_sequences, num_programs, len(batch.block_ids))
    buffer = torch.empty(buffer_size(*sizes), dtype=torch.int32, pin_memory=torch.cuda.is_available())
    fill(views(buffer, *sizes), batch)
    return buffer


def fill(arrays: DecodeArrays, batch: PagedBatch) -> None:
    """Write a batch's plan into host arrays of its sizes: programs have equal shares of all tiles, one after another.

    A chunk is what one program has of one sequence. A sequence without cached tokens has one chunk, of none.
    """
    cached = batch.lengths.astype(np.int64) - 1
    tile_start = np.concatenate([[0], np.cumsum(np.maximum(1, -(-cached // TILE_TOKENS)))])
    share = -(-int(tile_start[-1]) // arrays.num_programs)
    program_tile = np.arange(arrays.num_programs + 1) * share
    starts = np.union1d(tile_start[:-1], program_tile[program_tile < tile_start[-1]])
    sequence = np.searchsorted(tile_start, starts, side="right") - 1
    stops = np.append(starts[1:], tile_start[-1])
    count = len(starts)
    arrays.program_chunk.numpy()[:] = np.searchsorted(starts, program_tile)
    arrays.chunk_start.numpy()[:] = np.searchsorted(starts, tile_start)
    arrays.chunk_sequence.numpy()[:count] = sequence
    arrays.chunk_first.numpy()[:count] = (starts - tile_start[sequence]) * TILE_TOKENS
    arrays.chunk_stop.numpy()[:count] = np.minimum((stops - tile_start[sequence]) * TILE_TOKENS, cached[sequence])
    arrays.block_start.numpy()[:] = batch.block_start
    arrays.lengths.numpy()[:] = batch.lengths
    arrays.block_ids.numpy()[:] = batch.block_ids
