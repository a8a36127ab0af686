"""How fast iterations could be: what this machine reads and multiplies, measured, and an iteration's floor from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from neoserve.core.config import DTYPE_BYTES, ResolvedConfig
from neoserve.device.base import Device
from neoserve.engine.core import EngineCore
from neoserve.engine.telemetry import Iteration, Part

# Far more than the caches hold, far less than an engine leaves free beside its pools.
_READ_BYTES = {"cuda": 2**29, "cpu": 2**27}
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
        """Takes under a second on a GPU; nothing may be running."""
        device, dtype = core.device, getattr(torch, core.info.config.dtype)
        pool, num_bytes = core.worker_pool, _READ_BYTES[device.torch_device.type]
        return cls(
            _read_gb_per_s(device, num_bytes),
            _matrix_tflop_per_s(device, dtype, _MATRIX_ROWS[device.torch_device.type]),
            pool.read_bandwidth(num_bytes) if pool is not None else 0.0,
        )


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


def _read_gb_per_s(device: Device, num_bytes: int) -> float:
    """The better of two ways: to read all, and to copy one half to the other."""
    values = torch.zeros(2, num_bytes // 8, device=device.torch_device)
    reduce_us = _best_us(device, lambda: values.view(-1, 2**15).amax(1))
    copy_us = _best_us(device, lambda: values[0].copy_(values[1]))
    return num_bytes / min(reduce_us, copy_us) / 1e3


def _matrix_tflop_per_s(device: Device, dtype: torch.dtype, num_rows: int) -> float:
    left = torch.randn(num_rows, num_rows, device=device.torch_device, dtype=dtype)
    right = torch.randn(num_rows, num_rows, device=device.torch_device, dtype=dtype)
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
