"""What an execution device offers: streams, flags and operations.

Two implementations: `device/cuda.py` (an NVIDIA GPU) and `device/reference.py` (CPU tensors, with a thread as its
stream), so the whole engine runs and is tested on any machine.

The operations themselves (`Ops`) are defined a floor below, in `kernels/base.py`, and re-exported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from neoserve.kernels.base import BlockCopies, DecodePlans, Ops, PagedAttention, PagedBatch

__all__ = [
    "BlockTransfer",
    "Completion",
    "Copy",
    "DecodePlans",
    "Device",
    "Exchange",
    "Flag",
    "LayerCopies",
    "Mark",
    "Ops",
    "PagedAttention",
    "PagedBatch",
    "Transfer",
]


@dataclass(frozen=True, slots=True)
class Flag:
    """A 32-bit word in memory that host and device share, on a cache line of its own. Values only grow."""

    address: int


class Completion(Protocol):
    """Work that was submitted to a stream."""

    def wait(self) -> None:
        """Block until the work is done; raises what the work raised."""

    def done(self) -> bool:
        """Whether the work is done, without blocking."""

    def elapsed_us(self) -> float:
        """How long the work of a `submit` took on the device, once it is done."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy between device memory and memory that host and device share; one shape and dtype, both contiguous."""

    source: torch.Tensor
    target: torch.Tensor


class Exchange(Protocol):
    """A hand-off, as often as it is begun. It keeps the tensors that are copied."""

    def begin(self, value: int) -> None:
        """Inside `submit`, enqueue beside the compute stream: once the work so far is done, carry out the copy outward
        and raise `ready` to `value`; once `done` is >= value, carry out the copy back."""

    def finish(self) -> None:
        """Inside `submit`: later work of the compute stream waits until the copy back is done."""


class Mark:
    """A point in a stream's work; `Device.times_ns` says when the stream passed it."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies beside the compute stream, for who watches, and where they begin and end.

    what: "out" or "back" of a hand-off, or "tiers": KV between the tiers. channel: of the hand-off, else `None`.
    """

    what: Literal["out", "back", "tiers"]
    channel: int | None
    begin: Mark
    end: Mark


@dataclass(frozen=True, slots=True)
class BlockTransfer:
    """Blocks that pass between the tiers, to the host pool or from it, changing the layout.

    block_ids, host_block_ids: int64, of one length; they index dimension 1 of the two pools. Runs of consecutive host
    blocks cost the least.
    host_LNX: in the layout of csrc/attention/attention.h, X = 2KPD values a block; registered, each layer whole.
    buffer_NX: on the device, in that layout; what is more than it goes in several pieces.
    """

    kv_LN2KPD: torch.Tensor
    block_ids: np.ndarray
    host_LNX: torch.Tensor
    host_block_ids: np.ndarray
    buffer_NX: torch.Tensor
    to_host: bool


class LayerCopies(Protocol):
    """Copies of the same blocks, one layer at a time (`Device.layer_copies`)."""

    def submit(self, layer: int, host_layer: int) -> Completion:
        """Inside `submit`: as `Device.submit_copies`, copy a layer of the device's to or from one of the host pool.

        The completion may be another one's after the next layer but one.
        """


class _CopiesOfOps:
    """`LayerCopies` by `Ops.block_copies`. What it makes, it makes where the copies run."""

    def __init__(self, device: Device, transfer: BlockTransfer) -> None:
        self._device = device
        self._transfer = transfer
        self._copies: BlockCopies | None = None

    def submit(self, layer: int, host_layer: int) -> Completion:
        """As `LayerCopies`."""
        return self._device.submit_copies(lambda: self._run(layer, host_layer))

    def _run(self, layer: int, host_layer: int) -> None:
        transfer, device = self._transfer, self._device
        if self._copies is None:
            ids, host_ids = device.upload(transfer.block_ids), device.upload(transfer.host_block_ids)
            pools = transfer.kv_LN2KPD, ids, transfer.host_LNX, host_ids
            self._copies = device.ops.block_copies(*pools, to_host=transfer.to_host)
        self._copies.run(layer, host_layer)


class Device(ABC):
    """Where the model runs. Work is submitted in order to one compute stream and never waits on the caller.

    on_copy: while set, told of every copy beside the compute stream; it costs marks, so only a trace sets it.
    """

    torch_device: torch.device
    name: str
    ops: Ops
    on_copy: Callable[[Copy], None] | None = None

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A host tensor that the device can copy to and from without blocking, zeroed."""

    @abstractmethod
    def register(self, address: int, num_bytes: int, *, whole_bytes: int = 1) -> None:
        """Let the device reach memory that the host allocated, until `close`. Raises `HostMemoryError` if it cannot.

        whole_bytes: a tensor's copy (`copy_`) may be within any one of the ranges of so many bytes from `address` on;
        what lies in two of them only kernels reach at once.
        """

    @abstractmethod
    def upload(self, array: np.ndarray) -> torch.Tensor:
        """Inside `submit`: a device tensor with the array's values, without waiting for the copy."""

    @abstractmethod
    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Inside `submit`: a host tensor that holds the values once the submitted work is done."""

    @abstractmethod
    def submit(self, work: Callable[[], None]) -> Completion:
        """Run `work`, whose torch calls land on the compute stream, after all that was submitted before."""

    @abstractmethod
    def share_cores(self, *, with_workers: bool) -> None:
        """Inside `submit`: whether the worker pool attends during the work that follows, and needs its cores."""

    @abstractmethod
    def submit_copies(self, work: Callable[[], None]) -> Completion:
        """Run `work`, copies between the tiers, after all that was submitted before, beside what is submitted later.

        What needs the copies calls `wait_for` first. May be called inside `submit`.
        """

    def layer_copies(self, transfer: BlockTransfer) -> LayerCopies:
        """Inside `submit`: what copies blocks between the tiers beside the model's work, layer after layer."""
        return _CopiesOfOps(self, transfer)

    @abstractmethod
    def wait_for(self, completion: Completion) -> None:
        """Inside `submit`: later work of the compute stream waits, on the device, for what `submit_copies` began.

        Raises what that work raised while it was enqueued.
        """

    @abstractmethod
    def hold_exchanges(self, channel: int, completion: Completion) -> None:
        """Inside `submit`: as `wait_for`, but it is the channel's later exchanges that wait."""

    @abstractmethod
    def record(self, work: Callable[[], None], *, shared: bool, one_by_one: bool = False) -> Callable[[], None]:
        """Inside `submit`: a closure that enqueues, each time it is called, what `work` would: the same kernels at the
        same addresses, so whatever changes must lie in tensors that stay. `work` must have run once before.

        shared: the tensors that `work` allocates lie in memory that all such recordings share and that stays; what
        is in them is lost when another one runs. Else the recording has memory of its own, which ends with it.
        one_by_one: what it enqueues goes to the device kernel by kernel, not as one. That takes the CPU longer, and
        leaves nothing of the recording itself in the device's memory.
        """

    def for_layers(self, work: Callable[[torch.Tensor], None], layers: torch.Tensor) -> Callable[[int], None]:
        """A closure that, inside `submit`, enqueues `work(layers[layer])` each time it is called with a layer.

        All other tensors that `work` uses must stay, also those that it makes: the device may run `work` for some of
        the layers only, and do the same for the others at their addresses.
        """
        return lambda layer: work(layers[layer])

    @abstractmethod
    def synchronise(self) -> None:
        """Block until all work is done, also what was enqueued outside `submit`."""

    @abstractmethod
    def exchange(self, channel: int, outward: Transfer, ready: Flag, done: Flag, back: Transfer) -> Exchange:
        """A hand-off of that channel, not begun.

        channel: 0 or 1; the exchanges of one channel happen in order, those of two channels independently. One that
        has begun is finished before it begins again, or another does in its channel.
        """

    @abstractmethod
    def mark(self) -> Mark:
        """Inside `submit`: a point in the work of the stream that is current."""

    @abstractmethod
    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """When each mark was passed, in nanoseconds of the host's monotonic clock. Waits until the device is idle."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory of the device that is free now."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Memory of the device."""

    @abstractmethod
    def close(self) -> None:
        """End the streams. Nothing may be submitted afterwards."""
