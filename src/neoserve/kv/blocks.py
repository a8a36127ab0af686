"""Blocks of one pool: which are free, and which belong to a sequence in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class BlockPool:
    """Block ids 0 .. num_blocks - 1; the one freed last is taken first, so that a small load stays on few pages."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks; the caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        if count == 0:
            return []
        ids = self._free[-count:]
        del self._free[-count:]
        ids.reverse()
        return ids

    def give(self, ids: Iterable[int]) -> None:
        """Return blocks that `take` gave."""
        self._free.extend(ids)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Free plus `owned` blocks are the pool, each exactly once."""
        blocks = [*self._free, *owned]
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
