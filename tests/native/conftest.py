from collections.abc import Iterator

import numpy as np
import pytest

from neoserve import _native


class Flags:
    """Two flags, each on a cache line of its own."""

    def __init__(self) -> None:
        self._words = np.zeros(48, np.uint32)
        start = -self._words.ctypes.data % 64 // 4
        self.ready = self._words[start:].ctypes.data
        self.done = self._words[start + 16 :].ctypes.data


@pytest.fixture
def flags() -> Flags:
    return Flags()


@pytest.fixture
def pool() -> Iterator[_native.WorkerPool]:
    """Two workers where there are two CPUs."""
    pool = _native.WorkerPool(_native.allowed_cpus()[:2], spin_us=50)
    yield pool
    pool.close()
