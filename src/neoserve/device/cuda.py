"""An NVIDIA GPU: streams, events, pinned memory, and hand-offs by stream memory operations."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from neoserve.core.config import DType, ModelShape
from neoserve.core.errors import ConfigError
from neoserve.device.base import Completion, Device, Exchange, Flag, Transfer
from neoserve.device.driver import Driver
from neoserve.device.registration import RegisteredMemory
from neoserve.kernels.flashinfer_ops import FlashInferOps

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (7, 5)
_BFLOAT16_CAPABILITY = (8, 0)
_NUM_CHANNELS = 2


class _Submitted:
    """Work on a stream, between two events; its own `Completion`."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True, blocking=True)
        self.error: Exception | None = None

    def wait(self) -> None:
        self.end.synchronize()
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return bool(self.end.query())

    def elapsed_us(self) -> float:
        return float(self.start.elapsed_time(self.end)) * 1e3


class _Channel:
    """A stream for the hand-offs of one sub-batch, and the events that tie it to the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.sent = torch.cuda.Event()
        self.back = torch.cuda.Event()


class _Exchange:
    """A hand-off on its way. It keeps the tensors until `finish`: the compute stream's allocator must not give their
    memory away while the channel still copies."""

    def __init__(self, channel: _Channel, outward: Transfer, back: Transfer) -> None:
        self._channel = channel
        self._tensors = (outward, back)

    def finish(self) -> None:
        torch.cuda.current_stream().wait_event(self._channel.back)


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
        self.ops = FlashInferOps(shape, getattr(torch, dtype), block_size, self.torch_device)
        self._driver = Driver()
        self._compute = torch.cuda.Stream(self.torch_device, priority=-1)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._channels = tuple(_Channel(self.torch_device) for _ in range(_NUM_CHANNELS))
        self._registered: list[RegisteredMemory] = []
        self._flag_addresses: dict[int, int] = {}

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def register(self, address: int, num_bytes: int) -> None:
        self._registered.append(RegisteredMemory(self._driver, address, num_bytes))

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def submit(self, work: Callable[[], None]) -> Completion:
        return self._submit(self._compute, work)

    def submit_copies(self, work: Callable[[], None]) -> Completion:
        """As `submit`, on the stream for copies, after all that was submitted to either stream before.

        Work submitted later runs beside it; what needs its result calls `wait_for` first.
        """
        self._copies.wait_stream(self._compute)
        return self._submit(self._copies, work)

    def wait_for(self, completion: Completion) -> None:
        """Inside `submit`: later work of the stream waits, on the device, until `completion` is done."""
        assert isinstance(completion, _Submitted)
        torch.cuda.current_stream(self.torch_device).wait_event(completion.end)

    def _submit(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> _Submitted:
        submitted = _Submitted()
        with torch.cuda.stream(stream), torch.inference_mode():
            submitted.start.record(stream)
            try:
                work()
            except Exception as error:  # handed to whoever waits for the work
                submitted.error = error
            submitted.end.record(stream)
        return submitted

    def exchange(
        self, channel: int, outward: Transfer, ready: Flag, done: Flag, value: int, back: Transfer
    ) -> Exchange:
        """As `Device.exchange`; can be captured in a CUDA graph, which then keeps `value`."""
        side = self._channels[channel]
        side.sent.record()
        side.stream.wait_event(side.sent)
        with torch.cuda.stream(side.stream):
            outward.target.copy_(outward.source, non_blocking=True)
            self._driver.write_value(side.stream.cuda_stream, self._flag_address(ready), value)
            self._driver.wait_value(side.stream.cuda_stream, self._flag_address(done), value)
            back.target.copy_(back.source, non_blocking=True)
            side.back.record()
        return _Exchange(side, outward, back)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[1]

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
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
