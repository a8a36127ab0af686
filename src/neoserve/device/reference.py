"""The reference device: CPU tensors, and a thread as its compute stream.

`submit` returns at once and the thread runs the work in order, so launching ahead, flags and the worker pool behave
as they do on a GPU: a hand-off blocks the stream, never the caller.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import psutil
import torch

from neoserve import _native
from neoserve.core.errors import HostAttentionError
from neoserve.device.base import Completion, Copy, Device, Exchange, Flag, Mark, Transfer
from neoserve.kernels.reference import ReferenceOps


class _Work:
    """A closure on its way through the stream thread; its own `Completion`."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.duration_us = 0.0

    def do(self) -> None:
        """Run the closure on the calling thread."""
        start_s = time.perf_counter()
        try:
            self.run()
        except BaseException as error:  # handed to whoever waits for the work
            self.error = error
        self.duration_us = (time.perf_counter() - start_s) * 1e6
        self.finished.set()

    def wait(self) -> None:
        self.finished.wait()
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return self.finished.is_set()

    def elapsed_us(self) -> float:
        return self.duration_us


@dataclass(frozen=True, slots=True)
class _TimeMark(Mark):
    """When the stream's thread was there, in nanoseconds of the monotonic clock."""

    at_ns: int


class _Exchange:
    """The way back is made when it is needed: a thread that is its own stream cannot wait beside itself."""

    def __init__(
        self, timeout_s: float, ready: Flag, done: Flag, copy_out: Callable[[], None], copy_back: Callable[[], None]
    ) -> None:
        self._timeout_s = timeout_s
        self._ready = ready
        self._done = done
        self._copy_out = copy_out
        self._copy_back = copy_back
        self._value = 0

    def begin(self, value: int) -> None:
        self._value = value
        self._copy_out()
        _native.flag_raise(self._ready.address, value)

    def finish(self) -> None:
        if not _native.flag_wait(self._done.address, self._value, self._timeout_s):
            raise HostAttentionError(f"no worker raised the done flag to {self._value} within {self._timeout_s} s")
        self._copy_back()


class ReferenceDevice(Device):
    """CPU tensors behind the interface of a GPU.

    num_threads: torch's threads for the stream.
    num_beside_workers: as many while the worker pool attends, so that both together do not exceed the cores.
    flag_timeout_s: a backstop for a hand-off; the worker pool raises every armed flag long before.
    """

    def __init__(self, num_threads: int, num_beside_workers: int, flag_timeout_s: float = 120.0) -> None:
        self.torch_device = torch.device("cpu")
        self.ops = ReferenceOps()
        self.name = "reference (CPU)"
        self._num_threads = num_threads
        self._num_beside_workers = num_beside_workers
        self._flag_timeout_s = flag_timeout_s
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="neo-stream", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.share_cores(with_workers=True)  # so are costs measured: those of device-only iterations show soon
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                work.do()

    def share_cores(self, *, with_workers: bool) -> None:
        torch.set_num_threads(self._num_beside_workers if with_workers else self._num_threads)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def register(self, address: int, num_bytes: int, *, whole_bytes: int = 1) -> None:
        """Host memory is this device's memory: nothing to do."""

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def submit(self, work: Callable[[], None]) -> Completion:
        item = _Work(work)
        self._queue.put(item)
        return item

    def submit_copies(self, work: Callable[[], None]) -> Completion:
        """In the order of the one stream: at once where it is the stream that submits."""
        if threading.current_thread() is not self._thread:
            return self.submit(partial(self._copy_between_tiers, work))
        item = _Work(partial(self._copy_between_tiers, work))
        item.do()
        return item

    def _copy_between_tiers(self, work: Callable[[], None]) -> None:
        begin = self.mark()
        work()
        if self.on_copy is not None:
            self.on_copy(Copy("tiers", None, begin, self.mark()))

    def wait_for(self, completion: Completion) -> None:
        completion.wait()

    def hold_exchanges(self, channel: int, completion: Completion) -> None:
        completion.wait()

    def record(self, work: Callable[[], None], *, shared: bool, one_by_one: bool = False) -> Callable[[], None]:
        """The work itself: running it again is all there is to replay."""
        return work

    def synchronise(self) -> None:
        self.submit(lambda: None).wait()

    def exchange(self, channel: int, outward: Transfer, ready: Flag, done: Flag, back: Transfer) -> Exchange:
        copy_out, copy_back = partial(self._copy, "out", channel, outward), partial(self._copy, "back", channel, back)
        return _Exchange(self._flag_timeout_s, ready, done, copy_out, copy_back)

    def _copy(self, what: Literal["out", "back"], channel: int, transfer: Transfer) -> None:
        begin = self.mark()
        transfer.target.copy_(transfer.source)
        if self.on_copy is not None:
            self.on_copy(Copy(what, channel, begin, self.mark()))

    def mark(self) -> Mark:
        return _TimeMark(time.monotonic_ns())

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        return [mark.at_ns for mark in marks if isinstance(mark, _TimeMark)]

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def total_bytes(self) -> int:
        return int(psutil.virtual_memory().total)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
