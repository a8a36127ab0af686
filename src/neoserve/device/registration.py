"""Pinning a large range of host memory for the GPU: in chunks, by several threads, all or nothing.

Touching fresh memory takes several times as long as pinning it, and both scale with threads: each thread populates
a chunk and then pins it.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
from concurrent.futures import ThreadPoolExecutor

from neoserve.core.errors import HostMemoryError
from neoserve.device.driver import Driver, DriverError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**30
"""About so much is pinned at once."""
_NUM_THREADS = 8
_REPORT_CHUNKS = 16
_MADV_POPULATE_WRITE = 23


class RegisteredMemory:
    """A registered range of host memory. Kernels reach it at its own addresses, across chunks; a single copy by a
    copy engine stays within a chunk, so ranges of `whole_bytes` from the beginning on are never divided.

    Raises `HostMemoryError`, with nothing left registered, when the system refuses to pin all of it.
    """

    def __init__(self, driver: Driver, address: int, num_bytes: int, whole_bytes: int) -> None:
        self._driver = driver
        self._context = driver.current_context()
        self._chunks: list[int] = []
        unit = math.lcm(whole_bytes, mmap.PAGESIZE)  # two chunks must not share a page
        chunk_bytes = max(1, _CHUNK_BYTES // unit) * unit
        chunks = [(address + start, min(chunk_bytes, num_bytes - start)) for start in range(0, num_bytes, chunk_bytes)]
        errors: list[DriverError] = []
        libc = ctypes.CDLL(None)

        def register(chunk: tuple[int, int]) -> None:
            if errors:
                return
            try:
                # Before Linux 5.14 this does nothing, and pinning touches the pages, slower.
                libc.madvise(ctypes.c_void_p(chunk[0]), ctypes.c_size_t(chunk[1]), _MADV_POPULATE_WRITE)
                driver.use_context(self._context)
                driver.register(*chunk)
            except DriverError as error:
                errors.append(error)
                return
            self._chunks.append(chunk[0])
            if len(self._chunks) % _REPORT_CHUNKS == 0:
                pinned_gib = len(self._chunks) * chunk_bytes / 2**30
                logger.info("pinned %.0f of %.1f GiB of host memory", pinned_gib, num_bytes / 2**30)

        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="neo-register") as threads:
            list(threads.map(register, chunks))
        if errors:
            pinned_gib = len(self._chunks) * chunk_bytes / 2**30
            self.release()
            raise HostMemoryError(
                f"the system pinned {pinned_gib:.0f} GiB of the {num_bytes / 2**30:.1f} GiB of host memory asked for, "
                f"then refused ({errors[0]}); ask for less with --host-memory or raise the limit of locked memory"
            )

    def release(self) -> None:
        """Unpin everything; a second call does nothing."""
        while self._chunks:
            self._driver.unregister(self._chunks.pop())
