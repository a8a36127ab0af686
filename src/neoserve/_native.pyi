"""The compiled part: attention of the host tier, its worker pool, memory and flags. Addresses are plain integers.

A flag is a 32-bit word that host and device share, on a cache line of its own. Its value only grows, and may wrap: a
flag has reached a value when their signed 32-bit difference is not negative, as in cuStreamWaitValue32. Bad arguments
raise ValueError with their names and values; nothing here holds the GIL while it waits.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def instruction_sets() -> list[str]:
    """The tile policies that this machine can run, best first, of "amx", "avx512", "avx2", "portable"."""

def default_instruction_set() -> str:
    """The first of `instruction_sets()`, or what NEO_CPU_ISA names; raises ValueError if it cannot run here."""

def allowed_cpus() -> list[int]:
    """CPUs to use: those that affinity allows, one for each physical core first, by NUMA node; no more than the
    cgroup's quota pays for."""

def flag_read(address: int) -> int:
    """The flag's value; what was written before it was raised is visible afterwards."""

def flag_raise(address: int, value: int) -> None:
    """Set the flag, after all earlier writes of this thread, and wake who waits for it in this process."""

def flag_wait(address: int, value: int, timeout_s: float) -> bool:
    """Wait until the flag has reached `value`; false when the time is over.

    A flag that this process or its workers raise is seen within microseconds, one that a device writes within 1 ms.
    """

class HostMemory:
    """Zeroed memory, aligned to 2 MiB, on huge pages where the system gives them, freed with the object."""

    def __init__(self, num_bytes: int, *, huge_pages: bool = True, touch_cpus: Sequence[int] = ()) -> None:
        """With `touch_cpus`, a thread on each of these CPUs makes a part of the pages now, near that CPU; without,
        pages are made on first use. Raises MemoryError when the system does not give the memory."""
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def array(self) -> npt.NDArray[np.uint8]:
        """The memory as one dimension of bytes, sharing it and keeping it alive."""

class WorkerPool:
    """Threads pinned to `cpus`, one each, that attend the armed laps in the order in which they were armed.

    Who waits spins for `spin_us`, then sleeps; without an armed task nobody wakes. While a task is armed, one sleeping
    worker looks at its `ready` flag every `nap_us`, because a device that writes it wakes nobody; a flag raised by
    `flag_raise` is seen at once, so where no device writes flags a long nap saves CPU time.

    A task that is not done `deadline_s` after its `ready` flag, or whose worker throws or dies, is the pool's first
    error. From then until `clear_error`, every armed task's `done` is raised without work, so that nothing that waits
    for it hangs. Flags and memory of a task must live until its `done` is raised, and after an error until
    `clear_error` or `close` has returned.
    """

    def __init__(
        self, cpus: Sequence[int], *, spin_us: float = 5000.0, nap_us: float = 30.0, deadline_s: float = 30.0
    ) -> None: ...
    @property
    def num_workers(self) -> int: ...
    def error(self) -> str | None:
        """The first error since the last `clear_error`: which worker or task, and what happened."""
    def clear_error(self) -> None:
        """Drop all armed tasks (raising their `done`), wait until no worker is at work, replace dead workers, forget
        the error. Also without an error, to empty the queue. Raises RuntimeError when a worker does not come back
        within the deadline, or when the pool is closed."""
    def read_bandwidth(self, address: int, num_bytes: int, repeats: int = 3) -> float:
        """GB/s (10^9) at which the workers stream plain loads over this memory, each over its own part; the best of
        `repeats`. The memory must live until this returns, and after an error until `close` has."""
    def inject_fault(self, kind: str, *, after_tasks: int = 0, worker: int = -1) -> None:
        """For tests of what happens then: worker `worker` (negative: from the last) will "throw", "die" (its thread
        ends) or "stall" until the deadline passes, at the task after the next `after_tasks` ones."""
    def close(self) -> None:
        """Drop all armed tasks (raising their `done`; the error says so), end the threads. May be called again."""

class HostAttention:
    """Decode attention over one host KV pool. Layout and rules: csrc/attention/attention.h.

    `kv_address`: [num_layers][num_blocks][num_kv_heads][2][block_size * head_dim] of `dtype` ("float32", "bfloat16" or
    "float16"), which the caller keeps alive. `scale`: of the scores. `instruction_set`: `default_instruction_set()`
    unless given.
    """

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
        lengths: npt.NDArray[np.int32],
        block_start: npt.NDArray[np.int32],
        block_ids: npt.NDArray[np.int32],
        *,
        qkv_address: int,
        out_address: int,
        lse_address: int = 0,
    ) -> Lap:
        """Check and split the host rows of one lap; the arrays are copied, the memory stays the caller's.

        lengths: [B] tokens of each row's sequence, the new one included. block_start: [B + 1] where each row's block
        table begins in block_ids. qkv: [B][num_query_heads + 2 * num_kv_heads][head_dim], out:
        [B][num_query_heads][head_dim], both of the KV's dtype; lse: [B][num_query_heads] float32, none at address 0.
        """
    def arm(self, lap: Lap, layer: int, *, ready: int, ready_value: int, done: int, done_value: int) -> None:
        """Queue one layer: wait until flag `ready` has reached ready_value, attend, set flag `done` to done_value.

        Takes under a microsecond, and a system call when the workers sleep. Raises RuntimeError when 4096 tasks are
        armed already, and when the pool is closed, then after setting `done`.
        """
    def attend(self, lap: Lap, layer: int) -> None:
        """Attend one layer after what is armed, and wait for it; raises RuntimeError with the pool's error."""

class Lap:
    """Host rows of one lap, planned once and run once a layer. Armed layers keep it alive."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one layer reads."""
    @property
    def busy_us(self) -> float:
        """Time from `ready` seen to `done` raised, summed over the layers run so far."""
    @property
    def layers_done(self) -> int:
        """Layers run so far; those dropped in error do not count."""
    def timeline(self) -> npt.NDArray[np.int64]:
        """[layers run, 3]: layer, start and end in nanoseconds of the monotonic clock (`time.monotonic_ns`)."""

class DriverCalls:
    """Calls of the CUDA driver, made without Python in between.

    calls: of each the address of its function, and its arguments, filled up with zeros.
    words, arguments: what moves by the numbers that `run` is given: 8-byte words among what the arguments point to, as
    (address, index of the number), and arguments themselves, as (call, argument, index of the number).
    What the arguments point to must live as long as this object is used.
    Raises `IndexError` where there is no such call or argument.
    """

    def __init__(
        self,
        calls: Sequence[tuple[int, int, int, int, int]],
        words: Sequence[tuple[int, int]] = (),
        arguments: Sequence[tuple[int, int, int]] = (),
    ) -> None: ...
    def run(self, numbers: Sequence[int] = ()) -> int:
        """Make them in order, what moves so much more than it was at first; 0, or the first result that is another,
        after which no more are made. Raises `ValueError` when things move by numbers that are not there."""
