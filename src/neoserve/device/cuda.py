"""An NVIDIA GPU: streams, events, pinned memory, and hand-offs by stream memory operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from neoserve._native import DriverCalls
from neoserve.core.config import DType, ModelShape
from neoserve.core.errors import ConfigError
from neoserve.device.base import BlockTransfer, Completion, Copy, Device, Exchange, Flag, LayerCopies, Mark, Transfer
from neoserve.device.driver import Driver
from neoserve.device.events import EventMark, Submitted
from neoserve.device.exchange import Channel, StreamExchange
from neoserve.device.launches import ForLayers, Launches, no_collection
from neoserve.device.layer_copies import EngineCopies
from neoserve.device.registration import RegisteredMemory
from neoserve.kernels.block_copy import relayout
from neoserve.kernels.flashinfer_ops import FlashInferOps
from neoserve.kernels.fused_ops import FusedOps

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (7, 5)
_BFLOAT16_CAPABILITY = (8, 0)
_FUSED_CAPABILITY = (8, 0)
_NUM_CHANNELS = 2
_CLOCK_ATTEMPTS = 5


class _LayerCopies:
    """As `LayerCopies`. fork: what makes the stream of the copies follow all that was enqueued so far."""

    def __init__(
        self, device: Device, driver: Driver, stream: torch.cuda.Stream, fork: DriverCalls, copies: EngineCopies
    ) -> None:
        self._device = device
        self._driver = driver
        self._stream = stream
        self._fork = fork
        self._copies = copies
        self._ends = tuple(Submitted(timed=False) for _ in range(2))
        for end in self._ends:
            end.end.record(stream)  # torch makes an event when it is first recorded

    def submit(self, layer: int, host_layer: int) -> Completion:
        """As `LayerCopies`; by two native calls: every layer of a staged prompt has one or two of these."""
        watcher, end = self._device.on_copy, self._ends[host_layer % len(self._ends)]
        self._driver.run(self._fork)
        begin = EventMark.on(self._stream) if watcher is not None else None
        self._copies.run(layer, host_layer, end.end.cuda_event)
        if watcher is not None and begin is not None:
            watcher(Copy("tiers", None, begin, EventMark.on(self._stream)))
        return end


class CudaDevice(Device):
    """One GPU, with streams for compute, for migrations and for the hand-offs of each sub-batch.

    `submit` runs the closure at once on the calling thread: what it enqueues lands on the compute stream, and an
    error that it raises comes out of `Completion.wait`, as on a device whose stream is a thread.
    Raises `ConfigError` when there is no GPU or it is too old.
    """

    def __init__(self, shape: ModelShape, dtype: DType, block_size: int, index: int = 0) -> None:
        capability = _capability(index)
        if capability < OLDEST_CAPABILITY:
            raise ConfigError(
                f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
                f"NEO needs {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer, or --device reference"
            )
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        ops = FusedOps if capability >= _FUSED_CAPABILITY else FlashInferOps
        self.ops = ops(shape, getattr(torch, dtype), block_size, self.torch_device)
        self._driver = Driver()
        self._launches = Launches.by(self._driver)
        self._compute = torch.cuda.Stream(self.torch_device, priority=-1)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._inside: torch.cuda.Stream | None = None  # the stream of the `submit` that runs
        self._forked = torch.cuda.Event()
        self._forked.record(self._compute)  # torch makes an event when it is first recorded
        self._fork = DriverCalls(
            [
                self._driver.record_event(self._forked.cuda_event, self._compute.cuda_stream),
                self._driver.wait_event(self._copies.cuda_stream, self._forked.cuda_event),
            ]
        )
        self._channels = tuple(Channel(index, self.torch_device) for index in range(_NUM_CHANNELS))
        self._registered: list[RegisteredMemory] = []
        self._flag_addresses: dict[int, int] = {}
        self._shared_recording: torch.cuda.CUDAGraph | None = None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def share_cores(self, *, with_workers: bool) -> None:
        """A GPU has cores of its own: nothing to do."""

    def register(self, address: int, num_bytes: int, *, whole_bytes: int = 1) -> None:
        self._registered.append(RegisteredMemory(self._driver, address, num_bytes, whole_bytes))

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def submit(self, work: Callable[[], None]) -> Completion:
        return self._submit(self._compute, work, timed=True)

    def submit_copies(self, work: Callable[[], None]) -> Completion:
        self._driver.run(self._fork)
        submitted = self._submit(self._copies, work, timed=self.on_copy is not None)
        if self.on_copy is not None and submitted.start is not None:
            self.on_copy(Copy("tiers", None, EventMark(submitted.start), EventMark(submitted.end)))
        return submitted

    def layer_copies(self, transfer: BlockTransfer) -> LayerCopies:
        if self._launches is None:
            return super().layer_copies(transfer)
        places = np.arange(len(transfer.block_ids)) % len(transfer.buffer_NX)
        ids_2N = self.upload(np.stack((transfer.block_ids, places)))
        ids_2N.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            of_layers = self._driver, self._launches, self._copies.cuda_stream, relayout
            copies = EngineCopies(*of_layers, transfer, ids_2N)
        return _LayerCopies(self, self._driver, self._copies, self._fork, copies)

    def wait_for(self, completion: Completion) -> None:
        self._hold(self._compute, completion)

    def hold_exchanges(self, channel: int, completion: Completion) -> None:
        self._hold(self._channels[channel].stream, completion)

    def _hold(self, stream: torch.cuda.Stream, completion: Completion) -> None:
        assert isinstance(completion, Submitted)
        if completion.error is not None:
            raise completion.error
        stream.wait_event(completion.end)

    def record(self, work: Callable[[], None], *, shared: bool, one_by_one: bool = False) -> Callable[[], None]:
        """As `Device.record`, a CUDA graph; `one_by_one` if the driver can (CUDA 12.4)."""
        pool = self._shared_pool() if shared else torch.cuda.graph_pool_handle()
        if one_by_one and self._launches is not None:
            return self._launches.of(self._capture(work, pool, keep_graph=True), self._compute.cuda_stream)
        replay: Callable[[], None] = self._capture(work, pool).replay
        return replay

    def for_layers(self, work: Callable[[torch.Tensor], None], layers: torch.Tensor) -> Callable[[int], None]:
        if self._launches is None:
            return super().for_layers(work, layers)
        return ForLayers(self._launches, work, layers, self._compute.cuda_stream)

    def _shared_pool(self) -> Any:
        if self._shared_recording is None:
            # A pool ends with its last graph and cannot begin again, so it has one that stays.
            pool = torch.cuda.graph_pool_handle()
            self._shared_recording = self._capture(lambda: torch.zeros(1, device=self.torch_device), pool)
        return self._shared_recording.pool()

    def _capture(self, work: Callable[[], object], pool: Any, *, keep_graph: bool = False) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(keep_graph)
        # Not the context manager `torch.cuda.graph`: it collects garbage and empties the allocator's cache each time,
        # which takes a hundred times as long as recording a layer. But an earlier graph that is collected in the middle
        # of a capture ends it.
        with no_collection():
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def _submit(self, stream: torch.cuda.Stream, work: Callable[[], None], *, timed: bool) -> Submitted:
        if self._inside is None:
            with torch.inference_mode(), torch.cuda.stream(stream):
                return self._submit_inside(stream, work, timed=timed)
        torch.cuda.set_stream(stream)  # torch's context manager takes several times as long
        try:
            return self._submit_inside(stream, work, timed=timed)
        finally:
            torch.cuda.set_stream(self._inside)

    def _submit_inside(self, stream: torch.cuda.Stream, work: Callable[[], None], *, timed: bool) -> Submitted:
        submitted = Submitted(timed=timed)
        outer, self._inside = self._inside, stream
        if submitted.start is not None:
            submitted.start.record(stream)
        try:
            work()
        except Exception as error:  # handed to whoever waits for the work
            submitted.error = error
        finally:
            self._inside = outer
        submitted.end.record(stream)
        return submitted

    def exchange(self, channel: int, outward: Transfer, ready: Flag, done: Flag, back: Transfer) -> Exchange:
        flags = self._flag_address(ready), self._flag_address(done)
        compute = self._compute.cuda_stream
        return StreamExchange(self, self._driver, compute, self._channels[channel], (outward, back), flags)

    def mark(self) -> Mark:
        return EventMark.on(torch.cuda.current_stream(self.torch_device))

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """Counted back from an event that the host sees pass; of some attempts, the one that it saw soonest."""
        anchors = []
        for _ in range(_CLOCK_ATTEMPTS):
            torch.cuda.synchronize(self.torch_device)
            before_ns = time.monotonic_ns()
            anchor = torch.cuda.Event(enable_timing=True)
            anchor.record(self._compute)
            anchor.synchronize()
            after_ns = time.monotonic_ns()
            anchors.append((after_ns - before_ns, after_ns, anchor))
        _, now_ns, anchor = min(anchors, key=lambda attempt: attempt[0])
        return [now_ns - round(mark.event.elapsed_time(anchor) * 1e6) for mark in marks if isinstance(mark, EventMark)]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[1]

    def close(self) -> None:
        self.synchronise()
        while self._registered:
            self._registered.pop().release()

    def _flag_address(self, flag: Flag) -> int:
        if flag.address not in self._flag_addresses:
            self._flag_addresses[flag.address] = self._driver.device_address(flag.address)
        return self._flag_addresses[flag.address]


def usable_dtype(dtype: DType, index: int = 0) -> DType:
    """`dtype`, or float16 in place of bfloat16 on a GPU that has no bfloat16 arithmetic."""
    if dtype == "bfloat16" and _capability(index) < _BFLOAT16_CAPABILITY:
        logger.warning("%s has no bfloat16; using float16", torch.cuda.get_device_name(index))
        return "float16"
    return dtype


def _capability(index: int) -> tuple[int, int]:
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ConfigError(f"there is no GPU {index}; check the NVIDIA driver, or use --device reference")
    return torch.cuda.get_device_capability(index)
