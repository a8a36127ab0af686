"""How much memory there is: of the host within its limits, and of the device beside the model, measured.

Shape letters: T rows, H query heads, D head dim, N blocks, K kv heads, P tokens per block, B sampled rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from neoserve.core.config import EngineConfig
from neoserve.device.base import Device, PagedBatch
from neoserve.execution.head import GROUP_ROWS
from neoserve.execution.sampling import Draw, draw
from neoserve.models.decoder import Decoder, split_qkv

logger = logging.getLogger(__name__)

REFERENCE_DEVICE_FRACTION = 0.25
FRAGMENT_BYTES = 2**28
"""What the allocator may lose between the largest lap and the mix of all others."""
RECORDED_KERNEL_BYTES = 12 * 2**10
"""Device memory of one kernel in a recording; a layer has about a dozen."""
KERNELS_PER_LAYER = 12

_CGROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still get: what is available, within what its control group allows."""
    free = int(psutil.virtual_memory().available)
    for limit_name, usage_name in _CGROUP_FILES:
        try:
            limit, usage = int((cgroup / limit_name).read_text()), int((cgroup / usage_name).read_text())
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        free = min(free, max(0, limit - usage))
    return free


def device_kv_bytes(config: EngineConfig, device: Device, model: Decoder, num_rows: int, num_recordings: int) -> int:
    """What the device has for KV and staging, once the model is loaded.

    num_rows: of the largest lap. num_recordings: of whole laps, by their kernels, that are still to come.
    """
    if device.torch_device.type != "cuda":
        return int(device.free_bytes() * REFERENCE_DEVICE_FRACTION)
    lap_bytes = _largest_lap_bytes(config, device, model, num_rows)
    recorded_bytes = num_recordings * model.shape.num_layers * KERNELS_PER_LAYER * RECORDED_KERNEL_BYTES
    total_bytes = device.total_bytes()
    used_bytes = total_bytes - device.free_bytes()
    ours = int(total_bytes * config.gpu_memory_utilization)
    logger.info(
        "GPU memory in GiB: %.2f of %.2f for NEO; in use with the model %.2f, largest lap %.2f, graphs %.2f",
        *(count / 2**30 for count in (ours, total_bytes, used_bytes, lap_bytes, recorded_bytes)),
    )
    return ours - used_bytes - lap_bytes - recorded_bytes - FRAGMENT_BYTES


def _largest_lap_bytes(config: EngineConfig, device: Device, model: Decoder, num_rows: int) -> int:
    """Run the parts of the largest lap, which also loads their kernels; the memory that the allocator took for it."""
    parts = (lambda: _run_layers(config, device, model, num_rows), lambda: _run_head(device, model))
    return max(_reserved_bytes(device, part) for part in parts)


def _reserved_bytes(device: Device, work: Callable[[], None]) -> int:
    """What the allocator takes from the GPU for `work`."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device.torch_device)
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    device.submit(work).wait()
    peak = torch.cuda.max_memory_reserved(device.torch_device)
    torch.cuda.empty_cache()
    return peak - before


def _run_layers(config: EngineConfig, device: Device, model: Decoder, num_rows: int) -> None:
    """Two layers of one prompt of all rows, then one of decodes."""
    shape, torch_device = model.shape, device.torch_device
    num_blocks = -(-num_rows // config.block_size)
    x_TE = model.embed(torch.zeros(num_rows, dtype=torch.int64, device=torch_device))
    kv_N2KPD = x_TE.new_zeros(num_blocks, 2, shape.num_kv_heads, config.block_size, shape.head_dim)
    positions_T = torch.zeros(num_rows, dtype=torch.int64, device=torch_device)
    residual_TE = None
    num_decodes = min(GROUP_ROWS, num_blocks)
    prompt = _batch(np.array([num_rows]), np.array([num_blocks]), np.array([num_rows]))
    decodes = _batch(*(np.ones(num_decodes, dtype=np.int64) for _ in range(3)))
    for layer, batch in zip(model.layers, (prompt, prompt, decodes), strict=False):
        x_TE = x_TE[: batch.num_rows]
        positions_T = positions_T[: batch.num_rows]
        residual_TE = residual_TE[: batch.num_rows] if residual_TE is not None else None
        attention = device.ops.plan_attention(batch, decode=batch is decodes)
        qkv_TCD, residual_TE = layer.before_attention(x_TE, residual_TE, positions_T)
        attn_THD = x_TE.new_empty(batch.num_rows, shape.num_query_heads, shape.head_dim)
        q_THD, k_TKD, v_TKD = split_qkv(qkv_TCD, shape)
        attention.run(q_THD, k_TKD, v_TKD, kv_N2KPD, attn_THD)
        x_TE, residual_TE = layer.after_attention(attn_THD, residual_TE)


def _batch(rows: np.ndarray, blocks: np.ndarray, lengths: np.ndarray) -> PagedBatch:
    return PagedBatch(
        row_start=np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        block_start=np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32),
        block_ids=np.arange(blocks.sum(), dtype=np.int32),
        lengths=lengths.astype(np.int32),
    )


def _run_head(device: Device, model: Decoder) -> None:
    """A group of sampled rows whose draws sort the whole vocabulary."""
    torch_device = device.torch_device
    x_BE = model.embed(torch.zeros(GROUP_ROWS, dtype=torch.int64, device=torch_device))
    logits_BV = model.head(x_BE)
    columns_B5 = torch.tensor([1.0, 1.0, -torch.inf, model.shape.vocab_size, 0.9], device=torch_device)
    keys_B = torch.zeros(GROUP_ROWS, dtype=torch.int64, device=torch_device)
    draw(logits_BV, Draw(keys_B, columns_B5.expand(GROUP_ROWS, 5), True, model.shape.vocab_size, False))
