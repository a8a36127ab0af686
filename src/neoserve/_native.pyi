"""The compiled part: attention of the host tier, its worker pool, memory and flags. Addresses are plain integers."""

from collections.abc import Sequence

import numpy as np

def instruction_sets() -> list[str]:
    """The tile policies that this machine can run, best first, of "amx", "avx512", "avx2", "portable"."""

def default_instruction_set() -> str:
    """The first of `instruction_sets()`, or what NEO_CPU_ISA names; raises ValueError if it cannot run here."""

def allowed_cpus() -> list[int]:
    """CPUs that affinity and the cgroup leave to this process, one for each physical core first, by NUMA node."""

def flag_read(address: int) -> int: ...
def flag_raise(address: int, value: int) -> None: ...
def flag_wait(address: int, value: int, timeout_s: float) -> bool:
    """Wait, without the GIL, until the flag is >= value; false when the time is over."""

class HostMemory:
    """Zeroed memory on huge pages where the system gives them, freed with the object."""

    def __init__(self, num_bytes: int, *, huge_pages: bool = True) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def array(self) -> np.ndarray:
        """The memory as uint8, sharing it and keeping it alive."""

class WorkerPool:
    """Threads pinned to `cpus`, one each, that attend the armed laps in the order in which they were armed.

    They spin for `spin_us` after work, then sleep. A task that does not finish within `deadline_s` of its `ready`
    flag, whose worker throws or dies, records the first error and still raises `done`.
    """

    def __init__(self, cpus: Sequence[int], *, spin_us: float = 200.0, deadline_s: float = 30.0) -> None: ...
    @property
    def num_workers(self) -> int: ...
    def error(self) -> str | None:
        """The first error since `clear_error`, if any; the pool refuses work until it is cleared."""
    def clear_error(self) -> None:
        """Forget the error, replace dead workers."""
    def read_bandwidth(self, num_bytes: int, repeats: int = 3) -> float:
        """GB/s at which the workers stream plain loads over fresh huge-page memory, best of `repeats`."""
    def inject_fault(self, kind: str, *, after_tasks: int = 0) -> None:
        """For tests of what happens then: one worker will "throw", "die" or "stall" at the given task from now."""
    def close(self) -> None:
        """End the threads; tasks still armed end with an error and their `done` raised."""

class HostAttention:
    """Decode attention over one host KV pool. Layout and rules: csrc/attention/attention.h."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        num_layers: int,
        num_blocks: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: str,
        kv_address: int,
        scale: float,
        instruction_set: str | None = None,
    ) -> None: ...
    def plan(
        self,
        lengths: np.ndarray,
        block_start: np.ndarray,
        block_ids: np.ndarray,
        *,
        qkv_address: int,
        out_address: int,
        lse_address: int = 0,
    ) -> Lap:
        """Check and split the host rows of one lap (int32 arrays, copied)."""
    def arm(self, lap: Lap, layer: int, *, ready: int, ready_value: int, done: int, done_value: int) -> None:
        """Queue one layer: wait for flag `ready` >= ready_value, attend, set flag `done` to done_value."""
    def attend(self, lap: Lap, layer: int) -> None:
        """Attend one layer now and wait for it, without flags; raises RuntimeError when a worker fails."""

class Lap:
    """Host rows of one lap, planned once and run once a layer."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one layer reads."""
    @property
    def busy_us(self) -> float:
        """Time from `ready` seen to `done` raised, summed over the layers run so far."""
    @property
    def layers_done(self) -> int: ...
    def timeline(self) -> np.ndarray:
        """int64 [layers run, 3]: layer, start and end in nanoseconds of the monotonic clock."""
