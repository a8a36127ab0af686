"""Plans of decode attention: how sequences are cut into chunks for `decode_attention`.

Letters: B sequences, W chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from neoserve.kernels.base import PagedBatch
from neoserve.kernels.paged_arrays import aligned_spans, pad_decode

_SMALLEST_CHUNK = 64
"""Tokens of a chunk, below which a program takes longer to begin than to read them."""


@dataclass(frozen=True, slots=True)
class DecodeArrays:
    """A plan: views into one int32 buffer, on the host or on the device.

    chunk_start, block_start: [B + 1], cumulative numbers of chunks and of blocks. chunk_sequence: [W], each chunk's
    sequence, -1 for none. lengths: [B]. block_ids: [number of blocks]. They lie in this order, so that a buffer that is
    kept for the largest batch is filled with a prefix.
    """

    chunk_start: torch.Tensor
    chunk_sequence: torch.Tensor
    block_start: torch.Tensor
    lengths: torch.Tensor
    block_ids: torch.Tensor


def buffer_size(num_sequences: int, num_chunks: int, num_blocks: int) -> int:
    """int32 values that a plan takes."""
    return int(_spans(num_sequences, num_chunks, num_blocks)[-1].stop)


def views(buffer: torch.Tensor, num_sequences: int, num_chunks: int, num_blocks: int) -> DecodeArrays:
    """The arrays of a plan of these sizes in `buffer`, which has at least `buffer_size` values."""
    return DecodeArrays(*(buffer[span] for span in _spans(num_sequences, num_chunks, num_blocks)))


def _spans(num_sequences: int, num_chunks: int, num_blocks: int) -> tuple[slice, ...]:
    return tuple(aligned_spans((num_sequences + 1, num_chunks, num_sequences + 1, num_sequences, num_blocks)))


def planned(batch: PagedBatch, num_chunks: int, device: torch.device) -> DecodeArrays:
    """A decode batch's plan on the device, in memory of its own, by one copy on the current stream."""
    sizes = (batch.num_sequences, num_chunks, len(batch.block_ids))
    return views(_pinned(batch, num_chunks).to(device, non_blocking=True), *sizes)


class DecodePlanBuffer:
    """Memory on the device in which plans of some numbers of sequences are made again and again, a prefix of one buffer
    each: a plan overwrites the one before, in stream order.

    num_chunks: for each number of sequences. max_blocks: of all sequences of a batch together, padding included.
    """

    def __init__(
        self, num_chunks: Mapping[int, int], max_blocks: int, padding_block: int, device: torch.device
    ) -> None:
        self._num_chunks = num_chunks
        self._max_blocks = max_blocks
        self._padding_block = padding_block
        largest = max(buffer_size(size, chunks, max_blocks) for size, chunks in num_chunks.items())
        self._buffer = torch.zeros(largest, dtype=torch.int32, device=device)

    def arrays(self, num_sequences: int) -> DecodeArrays:
        """Where the plans of so many sequences lie."""
        return views(self._buffer, num_sequences, self._num_chunks[num_sequences], self._max_blocks)

    def plan(self, batch: PagedBatch, num_sequences: int) -> None:
        """Plan a batch, filled up to `num_sequences`, on the current stream; raises ValueError if it does not fit."""
        padded = pad_decode(batch, num_sequences, self._padding_block)
        if len(padded.block_ids) > self._max_blocks:
            raise ValueError(f"{len(padded.block_ids)} blocks; the plans hold {self._max_blocks}")
        pinned = _pinned(padded, self._num_chunks[num_sequences])
        self._buffer[: len(pinned)].copy_(pinned, non_blocking=True)


def _pinned(batch: PagedBatch, num_chunks: int) -> torch.Tensor:
    """The plan of a decode batch, in pinned memory of its own. Needs a chunk for each sequence at least."""
    sizes = (batch.num_sequences, num_chunks, len(batch.block_ids))
    buffer = torch.empty(buffer_size(*sizes), dtype=torch.int32, pin_memory=torch.cuda.is_available())
    arrays = views(buffer, *sizes)
    counts = chunk_counts(batch.lengths, num_chunks)
    num_used = int(counts.sum())
    arrays.chunk_start.numpy()[:] = np.concatenate([[0], np.cumsum(counts)])
    arrays.chunk_sequence.numpy()[:num_used] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    arrays.chunk_sequence.numpy()[num_used:] = -1
    arrays.block_start.numpy()[:] = batch.block_start
    arrays.lengths.numpy()[:] = batch.lengths
    arrays.block_ids.numpy()[:] = batch.block_ids
    return buffer


def chunk_counts(lengths_B: np.ndarray, num_chunks: int) -> np.ndarray:
    """Each sequence's share of at most `num_chunks`, by the tokens that it has cached; at least one each."""
    cached = np.maximum(lengths_B.astype(np.int64) - 1, 1)
    spare = num_chunks - len(cached)
    if spare <= 0:
        return np.ones_like(cached)
    return -(-cached // max(_SMALLEST_CHUNK, -(-int(cached.sum()) // spare)))
