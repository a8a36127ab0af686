"""How fast iterations could be: what this machine reads and multiplies, measured, and an iteration's floor from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from neoserve._native import HostMemory, WorkerPool
from neoserve.core.config import DTYPE_BYTES, ResolvedConfig
from neoserve.device.base import Device
from neoserve.engine.core import EngineCore
from neoserve.engine.telemetry import Iteration, Part

# Far more than the caches hold, of the device and of the host.
_READ_BYTES = {"cuda": 2**29, "cpu": 2**27}
_HOST_READ_BYTES = {"cuda": 2**31, "cpu": 2**27}
_MATRIX_ROWS = {"cuda": 8192, "cpu": 512}
_ATTEMPTS = 5
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine does at best: reading device memory, multiplying matrices, reading host memory (0: no tier)."""

    device_gb_per_s: float
    matrix_tflop_per_s: float
    host_gb_per_s: float

    @classmethod
    def measure(cls, core: EngineCore) -> Ceilings:
        """Takes under a second on a GPU; nothing may be running.

        A large model's weights serve as the values: its engine may leave no room for others.
        """
        device, pool = core.device, core.worker_pool
        num_bytes = _READ_BYTES[device.torch_device.type]
        values = core.weights.embedding_VE.flatten()
        if values.nbytes < num_bytes:
            values = torch.randn(num_bytes // values.itemsize, dtype=values.dtype, device=values.device)
            device.synchronise()
        return cls(
            _read_gb_per_s(device, values.view(torch.float32)[: num_bytes // 4]),
            _matrix_tflop_per_s(device, values, _MATRIX_ROWS[device.torch_device.type]),
            host_read_gb_per_s(pool, core.info.config.worker_cpus, _HOST_READ_BYTES[device.torch_device.type])
            if pool is not None
            else 0.0,
        )


def host_read_gb_per_s(pool: WorkerPool, cpus: Sequence[int], num_bytes: int) -> float:
    """How fast the workers, on `cpus`, stream so much memory, or a quarter of what is available if that is less."""
    memory = HostMemory(min(num_bytes, psutil.virtual_memory().available // 4), touch_cpus=cpus)
    return pool.read_bandwidth(memory.address, memory.num_bytes)


def _best_us(device: Device, work: Callable[[], object]) -> float:
    def several() -> None:
        for _ in range(_AT_ONCE):
            work()

    times = []
    for _ in range(_ATTEMPTS):
        completion = device.submit(several)
        completion.wait()
        times.append(completion.elapsed_us() / _AT_ONCE)
    return min(times)


def _read_gb_per_s(device: Device, values: torch.Tensor) -> float:
    rows = values.view(-1, 2**15)
    us = min(_best_us(device, lambda: rows.amax(1)), _best_us(device, lambda: rows.sum(1)))
    return values.nbytes / us / 1e3


def _matrix_tflop_per_s(device: Device, values: torch.Tensor, num_rows: int) -> float:
    left, right = values[: 2 * num_rows**2].view(2, num_rows, num_rows)
    return 2 * num_rows**3 / _best_us(device, lambda: left @ right.T) / 1e6


def floor_us(iteration: Iteration, config: ResolvedConfig, ceilings: Ceilings) -> float:
    """The least time for an iteration's work on the device: of each lap's part, reading its weights and KV, or its
    arithmetic, whichever takes longer; one part after another."""
    return sum(_part_us(part, config, ceilings) for part in iteration.parts)


def _part_us(part: Part, config: ResolvedConfig, ceilings: Ceilings) -> float:
    shape, load = config.shape, part.load
    layers = shape.num_layers * shape.layer_parameters
    head = shape.vocab_size * shape.hidden_size if part.ends and load.samples else 0
    num_bytes = (part.share * layers + head) * DTYPE_BYTES[config.dtype]
    num_bytes += part.share * load.device_tokens * shape.kv_bytes_per_token(config.dtype)
    pairs = load.prefill_pairs + load.device_tokens
    attention = 4 * shape.num_layers * shape.num_query_heads * shape.head_dim * pairs
    operations = part.share * (2 * layers * load.rows + attention) + 2 * head * load.samples
    return max(num_bytes / ceilings.device_gb_per_s / 1e3, operations / ceilings.matrix_tflop_per_s / 1e6)
