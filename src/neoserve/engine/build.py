"""Everything an engine needs, made in order: checkpoint, device, weights, pools, cost model, scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from neoserve import _native
from neoserve.core.config import DType, EngineConfig, ModelShape, ResolvedConfig
from neoserve.core.errors import ConfigError, HostMemoryError
from neoserve.device.base import Device
from neoserve.engine.calibrate import cost_table
from neoserve.engine.memory import DeviceBudget, release_unused, rough_kv_bytes
from neoserve.engine.resolve import Threads, resolve, share_cpus
from neoserve.execution.executor import Executor
from neoserve.kernels.host_attention import HOST_HEAD_DIMS
from neoserve.models.checkpoint import Checkpoint, open_checkpoint
from neoserve.models.decoder import Decoder
from neoserve.models.weights import DecoderWeights, dummy_weights, load_weights
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` made."""

    executor: Executor
    scheduler: Scheduler
    checkpoint_path: str | None
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    instruction_set: str


def build(config: EngineConfig, progress: Callable[[str], None], weights: DecoderWeights | None = None) -> Built:
    """Make an engine's parts; `progress` gets a line before each step that may take seconds.

    weights: of an earlier engine for the same model, dtype and device, to share; loaded when there are none.
    """
    checkpoint = open_checkpoint(config.model, config.revision, config.load_format)
    spec = checkpoint.spec
    config = choose_offload(config, spec.shape.head_dim)
    kind = choose_device(config)
    dtype = choose_dtype(config, spec.dtype, kind)
    threads = share_cpus(config, kind, host_tier=config.offload != "off")
    try:
        device = make_device(kind, spec.shape, dtype, config.block_size, threads)
        model = _load(config, checkpoint, dtype, device, progress, weights)
        executor, budget = _executor(config, kind, dtype, device, model, threads, progress)
        progress("recording graphs")
        recorded = executor.record_graphs()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{config.model or 'the model'} in {dtype} does not fit the GPU ({str(error).split('. ')[0]}); "
            "use a GPU with more memory, a smaller model, or lower --max-num-batched-tokens or --device-kv-tokens"
        ) from error
    if recorded is not None:
        progress(str(recorded))
    progress("measuring what iterations cost")
    cost = CostModel(cost_table(executor), spec.shape)
    release_unused(device)
    if budget is not None:
        budget.check(executor, recorded.num_bytes if recorded is not None else 0)
    return Built(
        executor=executor,
        scheduler=Scheduler(executor.config, cost),
        checkpoint_path=str(checkpoint.path) if checkpoint.path is not None else None,
        eos_ids=spec.eos_ids,
        default_sampling=dict(spec.default_sampling),
        instruction_set=_native.default_instruction_set() if executor.config.host_blocks else "",
    )


def _load(
    config: EngineConfig,
    checkpoint: Checkpoint,
    dtype: DType,
    device: Device,
    progress: Callable[[str], None],
    weights: DecoderWeights | None,
) -> Decoder:
    """The model on the device, with `weights` if they are there already."""
    spec = checkpoint.spec
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if weights is None:
        progress(f"loading weights ({dtype}) to {device.name}")
        if checkpoint.path is None or config.load_format == "dummy":
            weights = dummy_weights(spec, torch_dtype, device.torch_device, config.seed)
        else:
            weights = load_weights(spec, checkpoint.path, torch_dtype, device.torch_device)
    # A pool may turn out to hold less; the table of rotations is small.
    model = Decoder(spec, weights, device.ops, config.max_model_len)
    device.synchronise()
    return model


def _executor(
    config: EngineConfig,
    kind: Literal["cuda", "reference"],
    dtype: DType,
    device: Device,
    model: Decoder,
    threads: Threads,
    progress: Callable[[str], None],
) -> tuple[Executor, DeviceBudget | None]:
    """The executor with both pools, and what a GPU's memory was found to be; without a host tier when the system
    refuses its memory and "auto" allows it."""

    def resolved(asked: EngineConfig, kv_bytes: int) -> ResolvedConfig:
        return resolve(
            asked,
            model.shape,
            model_name=config.model or "embedded",
            dtype=dtype,
            device=kind,
            device_kv_bytes=kv_bytes,
            threads=threads,
        )

    def make(asked: EngineConfig) -> tuple[Executor, DeviceBudget | None]:
        runs, budget = resolved(asked, rough_kv_bytes(device)), None
        if kind == "cuda":
            # A pool of a given size leaves what is left: whether recordings fit there shows when they are made.
            recordings = asked.device_kv_tokens is None
            progress("measuring memory")
            budget = DeviceBudget.measure(device, model, runs, asked.gpu_memory_utilization, recordings=recordings)
            runs = resolved(asked, budget.kv)
        progress(
            f"KV pools: device {runs.device_blocks * runs.block_size} tokens, "
            f"host {runs.host_blocks * runs.block_size} tokens"
        )
        return Executor(runs, model, device), budget

    try:
        return make(config)
    except HostMemoryError as error:
        if config.offload != "auto":
            raise
        logger.warning("running without a host tier: %s", error)
    return make(replace(config, offload="off", host_memory_bytes=None))


def choose_offload(config: EngineConfig, head_dim: int) -> EngineConfig:
    """`config`, device-only where "auto" meets a head dimension that the host tier cannot attend to.

    Raises `ConfigError` where "all" does.
    """
    if config.offload == "off" or head_dim in HOST_HEAD_DIMS:
        return config
    reason = (
        f"the host tier attends to head dimensions {', '.join(map(str, HOST_HEAD_DIMS))}; the model's is {head_dim}"
    )
    if config.offload == "all":
        raise ConfigError(f"{reason}; use --offload off")
    logger.warning("running without a host tier: %s", reason)
    return replace(config, offload="off", host_memory_bytes=None)


def choose_device(config: EngineConfig) -> Literal["cuda", "reference"]:
    """The device that `config` asks for; "auto" is the GPU when there is one."""
    if config.device != "auto":
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but torch finds no usable NVIDIA GPU; use --device reference")
        return config.device
    return "cuda" if torch.cuda.is_available() else "reference"


def choose_dtype(config: EngineConfig, stored: DType, device: str) -> DType:
    """The dtype that runs: what is asked for, else what the checkpoint is stored in, or bfloat16 where that is float32
    and the device is a GPU, whose kernels have none."""
    names: dict[str, DType] = {"auto": stored, "float": "float32", "half": "float16"}
    for name in ("float32", "bfloat16", "float16"):
        names[name] = name
    chosen = names[config.dtype]
    if device != "cuda":
        return chosen
    from neoserve.device.cuda import usable_dtype

    if config.dtype == "auto" and chosen == "float32":
        chosen = usable_dtype("bfloat16")
        logger.info("the checkpoint is stored in float32, which the GPU's attention has not; running in %s", chosen)
    return usable_dtype(chosen)


def make_device(
    kind: Literal["cuda", "reference"], shape: ModelShape, dtype: DType, block_size: int, threads: Threads
) -> Device:
    """The device itself; the modules of a GPU are imported only where one is used."""
    if kind == "cuda":
        from neoserve.device.cuda import CudaDevice

        return CudaDevice(shape, dtype, block_size)
    from neoserve.device.reference import ReferenceDevice

    return ReferenceDevice(threads.num_compute, threads.num_beside_workers)
