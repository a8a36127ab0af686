"""Everything an engine needs, made in order: checkpoint, device, weights, pools, cost model, scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from neoserve import _native
from neoserve.core.config import DType, EngineConfig, ModelShape
from neoserve.core.errors import ConfigError
from neoserve.device.base import Device
from neoserve.engine.calibrate import cost_table
from neoserve.engine.resolve import REFERENCE_DEVICE_FRACTION, resolve, share_cpus
from neoserve.execution.executor import Executor
from neoserve.models.checkpoint import open_checkpoint
from neoserve.models.decoder import Decoder
from neoserve.models.weights import dummy_weights, load_weights
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` made."""

    executor: Executor
    scheduler: Scheduler
    checkpoint_path: str | None
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    instruction_set: str


def build(config: EngineConfig, progress: Callable[[str], None]) -> Built:
    """Make an engine's parts; `progress` gets a line before each step that may take seconds."""
    checkpoint = open_checkpoint(config.model, config.revision, config.load_format)
    spec = checkpoint.spec
    kind = choose_device(config)
    dtype = choose_dtype(config, spec.dtype, kind)
    threads = share_cpus(config, kind, host_tier=config.offload != "off")
    device = make_device(kind, spec.shape, dtype, config.block_size, threads.num_compute)
    progress(f"loading weights ({dtype}) to {device.name}")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if checkpoint.path is None or config.load_format == "dummy":
        weights = dummy_weights(spec, torch_dtype, device.torch_device, config.seed)
    else:
        weights = load_weights(spec, checkpoint.path, torch_dtype, device.torch_device)
    resolved = resolve(
        config,
        spec.shape,
        model_name=config.model or "embedded",
        dtype=dtype,
        device=kind,
        device_kv_bytes=int(device.free_bytes() * REFERENCE_DEVICE_FRACTION),
        threads=threads,
    )
    progress(
        f"KV pools: device {resolved.device_blocks * resolved.block_size} tokens, "
        f"host {resolved.host_blocks * resolved.block_size} tokens"
    )
    model = Decoder(spec, weights, device.ops, resolved.max_model_len)
    executor = Executor(resolved, model, device)
    progress("measuring what iterations cost")
    cost = CostModel(cost_table(executor), spec.shape)
    return Built(
        executor=executor,
        scheduler=Scheduler(resolved, cost),
        checkpoint_path=str(checkpoint.path) if checkpoint.path is not None else None,
        eos_ids=spec.eos_ids,
        default_sampling=dict(spec.default_sampling),
        instruction_set=_native.default_instruction_set() if resolved.host_blocks else "",
    )


def choose_device(config: EngineConfig) -> Literal["cuda", "reference"]:
    """The device that `config` asks for; "auto" is the GPU when there is one."""
    if config.device != "auto":
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but torch finds no usable NVIDIA GPU; use --device reference")
        return config.device
    return "cuda" if torch.cuda.is_available() else "reference"


def choose_dtype(config: EngineConfig, stored: DType, device: str) -> DType:
    """The dtype that runs: what is asked for, else what the checkpoint is stored in."""
    names: dict[str, DType] = {"auto": stored, "float": "float32", "half": "float16"}
    for name in ("float32", "bfloat16", "float16"):
        names[name] = name
    chosen = names[config.dtype]
    if device == "cuda":
        from neoserve.device.cuda import usable_dtype

        return usable_dtype(chosen)
    return chosen


def make_device(
    kind: Literal["cuda", "reference"], shape: ModelShape, dtype: DType, block_size: int, num_threads: int
) -> Device:
    """The device itself; the modules of a GPU are imported only where one is used."""
    if kind == "cuda":
        from neoserve.device.cuda import CudaDevice

        return CudaDevice(shape, dtype, block_size)
    from neoserve.device.reference import ReferenceDevice

    return ReferenceDevice(num_threads)
