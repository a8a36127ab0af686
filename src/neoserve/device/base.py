"""What an execution device offers: streams, flags and operations.

Two implementations: `device/cuda.py` (an NVIDIA GPU) and `device/reference.py` (CPU tensors, with a thread as its
stream), so the whole engine runs and is tested on any machine.

The operations themselves (`Ops`) are defined a floor below, in `kernels/base.py`, and re-exported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from neoserve.kernels.base import Ops, PagedAttention, PagedBatch

__all__ = ["Completion", "Device", "Flag", "Ops", "PagedAttention", "PagedBatch"]


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
        """How long the work took on the device, once it is done."""


class Device(ABC):
    """Where the model runs. Work is submitted in order to one compute stream and never waits on the caller."""

    torch_device: torch.device
    name: str
    ops: Ops

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A host tensor that the device can copy to and from without blocking, zeroed."""

    @abstractmethod
    def register(self, address: int, num_bytes: int) -> None:
        """Let the device reach memory that the host allocated, until `close`. Raises `ConfigError` if it cannot."""

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
    def raise_flag(self, flag: Flag, value: int) -> None:
        """Stream operation, inside `submit`: write `value` once all earlier work of the stream is visible."""

    @abstractmethod
    def wait_flag(self, flag: Flag, value: int) -> None:
        """Stream operation, inside `submit`: later work of the stream waits until the flag is >= value."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory of the device that is free now."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Memory of the device."""

    @abstractmethod
    def close(self) -> None:
        """End the streams. Nothing may be submitted afterwards."""
