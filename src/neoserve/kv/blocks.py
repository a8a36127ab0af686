"""Blocks of one pool: which are free, and which belong to a sequence in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class BlockPool:
    """Block ids 0 .. num_blocks - 1. Several are taken in as few runs of consecutive ids as can be, since a run is
    copied at once: the shortest that is long enough, or the longest ones. A single one is the lowest."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._is_free = np.ones(num_blocks, dtype=np.bool_)

    def take(self, count: int) -> list[int]:
        """`count` free blocks; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        if count == 0:
            return []
        ids = [int(self._is_free.argmax())] if count == 1 else self._in_runs(count)
        self._is_free[ids] = False
        self.num_free -= count
        return ids

    def _in_runs(self, count: int) -> list[int]:
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if lengths.max() >= count:
            start = int(starts[np.where(lengths >= count, lengths, self.num_blocks + 1).argmin()])
            return list(range(start, start + count))
        ids: list[int] = []
        for run in np.argsort(-lengths):
            ids.extend(range(starts[run], starts[run] + lengths[run]))
            if len(ids) >= count:
                break
        return ids[:count]

    def give(self, ids: Sequence[int]) -> None:
        """Return blocks that `take` gave."""
        self._is_free[ids] = True
        self.num_free += len(ids)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Free plus `owned` blocks are the pool, each exactly once."""
        blocks = [*np.flatnonzero(self._is_free).tolist(), *owned]
        assert len(blocks) == self.num_blocks, f"{len(blocks)} blocks are accounted for, the pool has {self.num_blocks}"
        assert len(set(blocks)) == len(blocks), "a block has two owners"
        assert all(0 <= block < self.num_blocks for block in blocks), "a block id is outside the pool"


class BlockTable:
    """A sequence's blocks in order. Only grows, so views given out stay right while it does."""

    __slots__ = ("_ids", "_view")

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.empty(max(8, 2 * len(ids)), dtype=np.int32)
        self._view = self._ids[:0]
        self.extend(ids)

    def __len__(self) -> int:
        return len(self._view)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """All blocks: a read-only view, the same object until the table grows."""
        return self._view

    def extend(self, ids: Sequence[int]) -> None:
        """Append blocks."""
        old = len(self._view)
        new = old + len(ids)
        if new > len(self._ids):
            self._ids = np.concatenate([self._view, np.empty(new, dtype=np.int32)])
        self._ids[old:new] = ids
        self._view = self._ids[:new]
        self._view.flags.writeable = False
