"""From what the user asked to what runs: every size and choice, each from a fact of the model or the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from neoserve import _native
from neoserve.core.config import DType, EngineConfig, ModelShape, ResolvedConfig, transfer_blocks
from neoserve.core.errors import ConfigError
from neoserve.engine.memory import free_host_bytes

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_BATCHED_TOKENS = {"cuda": 2048, "reference": 512}
HOST_MEMORY_FRACTION = {"cuda": 0.7, "reference": 0.25}
ENGINE_THREADS = 2
"""Threads of a GPU engine that are busy while the workers are: the loop, and the driver's."""


@dataclass(frozen=True, slots=True)
class Threads:
    """Who gets which CPUs: no more busy threads than cores, or everything halves.

    num_compute: of the model on the reference device. num_beside_workers: as many while the worker pool attends.
    """

    worker_cpus: tuple[int, ...]
    num_compute: int
    num_beside_workers: int


def share_cpus(config: EngineConfig, device: Literal["cuda", "reference"], host_tier: bool) -> Threads:
    """Divide the allowed CPUs between the worker pool and the engine (on the reference device, the model's threads,
    of which there are no more than torch would take, so OMP_NUM_THREADS limits them)."""
    cpus = _native.allowed_cpus()
    if config.host_threads is not None and config.host_threads > len(cpus):
        raise ConfigError(
            f"--host-threads is {config.host_threads}, but this process may use only {len(cpus)} CPUs; lower it"
        )
    num_compute = min(len(cpus), torch.get_num_threads())
    if not host_tier:
        return Threads((), num_compute, num_compute)
    wanted = len(cpus) - ENGINE_THREADS if device == "cuda" else len(cpus) // 2
    num_workers = config.host_threads or max(1, wanted)
    return Threads(tuple(cpus[-num_workers:]), num_compute, max(1, min(len(cpus) - num_workers, num_compute)))


def batch_limits(config: EngineConfig, device: Literal["cuda", "reference"]) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens. Raises `ConfigError` when they do not go together."""
    max_num_seqs = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    batched_tokens = config.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS[device], max_num_seqs)
    if batched_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens is {batched_tokens}, less than --max-num-seqs ({max_num_seqs}): "
            "each decoding sequence needs a row; raise the one or lower the other"
        )
    return max_num_seqs, batched_tokens


def resolve(
    config: EngineConfig,
    shape: ModelShape,
    *,
    model_name: str,
    dtype: DType,
    device: Literal["cuda", "reference"],
    device_kv_bytes: int,
    threads: Threads,
) -> ResolvedConfig:
    """Decide everything. `device_kv_bytes`: what the device has left for KV and staging, once the model is loaded.

    Raises `ConfigError` when what was asked for does not fit, saying what to change.
    """
    block_bytes = shape.kv_bytes_per_token(dtype) * config.block_size
    max_num_seqs, batched_tokens = batch_limits(config, device)
    wanted_len = config.max_model_len or shape.max_position
    most_blocks = max_num_seqs * -(-wanted_len // config.block_size)
    host_blocks = _host_blocks(config, device, block_bytes, most_blocks)
    staging_blocks = 0
    if host_blocks:
        staging_blocks = -(-(wanted_len + 2 * batched_tokens) // config.block_size)
    staging_bytes = (2 * staging_blocks + transfer_blocks(staging_blocks)) * block_bytes // shape.num_layers
    device_blocks = _device_blocks(config, block_bytes, device_kv_bytes - staging_bytes, most_blocks)
    largest = max(device_blocks, host_blocks) * config.block_size
    if config.max_model_len is not None and config.max_model_len > largest:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but the larger KV pool holds {largest} tokens "
            f"(device {device_blocks * config.block_size}, host {host_blocks * config.block_size}); "
            "lower it, or raise --device-kv-tokens or --host-memory"
        )
    return ResolvedConfig(
        model_name=model_name,
        shape=shape,
        dtype=dtype,
        device=device,
        seed=config.seed,
        max_model_len=min(wanted_len, largest),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        block_size=config.block_size,
        offload=config.offload,
        device_blocks=device_blocks,
        host_blocks=host_blocks,
        staging_blocks=staging_blocks,
        worker_cpus=threads.worker_cpus,
        host_deadline_s=config.host_deadline_s,
        target_tpot_ms=config.target_tpot_ms,
        target_ttft_ms=config.target_ttft_ms,
        max_waiting=config.max_waiting,
        # The reference device does the work where it enqueues it: a recording saves nothing, its spare rows cost.
        enforce_eager=config.enforce_eager or device == "reference",
    )


def _host_blocks(config: EngineConfig, device: str, block_bytes: int, most_blocks: int) -> int:
    if config.offload == "off":
        return 0
    if config.host_memory_bytes is not None:
        blocks = config.host_memory_bytes // block_bytes
    else:
        blocks = min(int(free_host_bytes() * HOST_MEMORY_FRACTION[device]) // block_bytes, most_blocks)
    if blocks == 0:
        raise ConfigError(
            f"the host tier has no room for one block of {block_bytes} bytes; raise --host-memory or use --offload off"
        )
    return blocks


def _device_blocks(config: EngineConfig, block_bytes: int, free_bytes: int, most_blocks: int) -> int:
    if config.offload == "all":
        return 0
    room = max(0, free_bytes // block_bytes)
    if config.device_kv_tokens is None:
        blocks = min(room, most_blocks)
    else:
        blocks = -(-config.device_kv_tokens // config.block_size)
        if blocks > room:
            raise ConfigError(
                f"--device-kv-tokens is {config.device_kv_tokens}, but the device has room for "
                f"{room * config.block_size} tokens of KV; lower it or raise --gpu-memory-utilization"
            )
    if blocks <= 0:
        raise ConfigError(
            f"the device has {free_bytes / 2**30:.2f} GiB left for KV beside the model, less than one block of "
            f"{block_bytes / 2**20:.2f} MiB; raise --gpu-memory-utilization, lower --max-num-batched-tokens or "
            "--max-model-len, or use --offload all"
        )
    return blocks
