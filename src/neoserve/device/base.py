"""What an execution device offers: streams, flags and operations.

Two implementations: `device/cuda.py` (an NVIDIA GPU) and `device/reference.py` (CPU tensors, with a thread as its
stream), so the whole engine runs and is tested on any machine.

Shape letters: T rows, B sequences, H query heads, K kv heads, D head dim, E model dim, F ffn dim, N blocks,
P tokens per block, V vocabulary. The device's KV of one layer is `kv_N2KPD`: K at index 0, V at index 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences whose new rows attend to their paged KV. All arrays int32, on the host.

    row_start: [B + 1] cumulative number of rows of each sequence (first is 0).
    block_start: [B + 1] cumulative number of blocks. block_ids: [block_start[-1]] block tables, one after another.
    lengths: [B] tokens in the KV once this lap's rows are appended; the rows are the last ones, causal.
    """

    row_start: np.ndarray
    block_start: np.ndarray
    block_ids: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


class PagedAttention(Protocol):
    """One `PagedBatch` planned for a device: built once a lap, run once a layer."""

    def append(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv_N2KPD: torch.Tensor) -> None:
        """Write the rows' k and v at their places in the paged KV."""

    def run(self, q_THD: torch.Tensor, kv_N2KPD: torch.Tensor, out_THD: torch.Tensor) -> None:
        """Causal attention of the rows over their sequences' KV, softmax scale D**-0.5, into `out_THD`."""


class Ops(ABC):
    """The operations of a decoder layer on one device. Tensors are on the device, in the model's dtype."""

    @abstractmethod
    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (any leading shape), mean in fp32."""

    @abstractmethod
    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x in place; returns rms_norm(residual). `x_TE` may be overwritten by the result."""

    @abstractmethod
    def rope(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cache_PD: torch.Tensor) -> None:
        """Rotate q and k in place (NeoX halves). cache_PD: fp32, a row per position: D/2 cosines, then D/2 sines.

        q and k may be strided views into a fused qkv row. positions_T is int32 or int64.
        """

    @abstractmethod
    def silu_and_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """silu(first half of the last dimension) * second half."""

    @abstractmethod
    def plan_attention(self, batch: PagedBatch, *, decode: bool) -> PagedAttention:
        """Plan attention for a lap. `decode` promises one row a sequence."""

    @abstractmethod
    def blocks_to_host(
        self, kv_LN2KPD: torch.Tensor, block_ids_N: torch.Tensor, host_LNX: torch.Tensor, host_block_ids_N: torch.Tensor
    ) -> None:
        """Copy blocks of some layers into the host pool, changing to its layout (csrc/attention/attention.h).

        block_ids_N, host_block_ids_N: int64, on the device, of one length; they index dimension 1 of the two pools.
        host_LNX: the same layers of the host pool, X = 2KPD values a block.
        """

    @abstractmethod
    def blocks_from_host(
        self, host_LNX: torch.Tensor, host_block_ids_N: torch.Tensor, kv_LN2KPD: torch.Tensor, block_ids_N: torch.Tensor
    ) -> None:
        """The way back of `blocks_to_host`."""


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
