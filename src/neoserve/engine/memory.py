"""How much memory there is: of the host within its limits, and of the device beside the model, measured.

Shape letters: T rows, N blocks, K kv heads, P tokens per block, D head dim, B sampled rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import ConfigError
from neoserve.core.plan import Rows, Tier
from neoserve.core.request import MAX_LOGPROBS, Request, SamplingParams
from neoserve.device.base import Device, PagedBatch
from neoserve.execution.executor import Executor
from neoserve.execution.graphs import measure_recordings
from neoserve.execution.head import GROUP_ROWS
from neoserve.execution.linear import EagerLinear
from neoserve.execution.logprobs import token_logprobs
from neoserve.execution.sampling import SamplingState
from neoserve.models.decoder import Decoder, split_qkv

logger = logging.getLogger(__name__)

REFERENCE_DEVICE_FRACTION = 0.25
SPARE_BYTES = 2**28
"""For what is not measured: holes between blocks of other laps' sizes, and kernels that load at their first use."""
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


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """Memory of a GPU, in bytes, as measured at start before there is a pool.

    ours: what NEO may use. used: in use with the model. lap: what the largest lap takes while it runs, with what
    sampling keeps once a request asks for penalties. recordings: what they take.
    """

    ours: int
    used: int
    lap: int
    recordings: int

    @classmethod
    def measure(
        cls, device: Device, model: Decoder, config: ResolvedConfig, utilization: float, *, recordings: bool
    ) -> DeviceBudget:
        """By running the parts of the largest lap, which loads their kernels, and by recording for `config` once.

        recordings: whether to record; else they count as nothing.
        """
        lap_bytes = _lap_bytes(device, model, config)
        release_unused(device)
        used_bytes = device.total_bytes() - device.free_bytes()
        recorded_bytes = measure_recordings(device, model, config) if recordings else 0
        release_unused(device)
        return cls(int(device.total_bytes() * utilization), used_bytes, lap_bytes, recorded_bytes)

    @property
    def kv(self) -> int:
        """What is left for KV and staging."""
        return self.ours - self.used - self.lap - self.recordings - SPARE_BYTES

    def check(self, executor: Executor, recorded_bytes: int) -> None:
        """Log where the memory went, once all is in its place; raises `ConfigError` if it is more than NEO may use."""
        device, store = executor.device, executor.store
        used_bytes = device.total_bytes() - device.free_bytes()
        parts = {
            "weights": executor.model.weights.num_bytes,
            "KV": store.device_LN2KPD.nbytes,
            "staging": store.staging_LN2KPD.nbytes + store.transfer_NX.nbytes,
            "graphs": max(recorded_bytes, self.recordings),  # the driver keeps what the first ones took for the next
        }
        parts["CUDA, kernels and workspaces"] = used_bytes - sum(parts.values())
        parts["largest lap"] = self.lap
        parts["left alone"] = device.total_bytes() - used_bytes - self.lap
        listed = ", ".join(f"{what} {num_bytes / 2**30:.2f}" for what, num_bytes in parts.items())
        logger.info("GPU memory of %.2f GiB: %s", device.total_bytes() / 2**30, listed)
        if used_bytes + self.lap > self.ours:
            raise ConfigError(
                f"NEO needs {(used_bytes + self.lap) / 2**30:.2f} GiB of the GPU, {self.lap / 2**30:.2f} of them for "
                f"its largest lap, and may use {self.ours / 2**30:.2f}; lower --device-kv-tokens or "
                "--max-num-batched-tokens, or raise --gpu-memory-utilization"
            )


def rough_kv_bytes(device: Device) -> int:
    """What the device could give for KV and staging, before anything is measured."""
    if device.torch_device.type == "cuda":
        return device.free_bytes()
    return int(device.free_bytes() * REFERENCE_DEVICE_FRACTION)


def release_unused(device: Device) -> None:
    """Give memory that only start-up took back to the GPU, so that it is there for any other size."""
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()


def _lap_bytes(device: Device, model: Decoder, config: ResolvedConfig) -> int:
    """Memory of the largest lap: either of its layers or of its head, and what sampling keeps."""
    shape, dtype = config.shape, getattr(torch, config.dtype)
    size = (config.blocks_for(config.max_num_batched_tokens), 2, shape.num_kv_heads, config.block_size, shape.head_dim)
    kv_N2KPD = torch.zeros(size, dtype=dtype, device=device.torch_device)
    state = SamplingState(config.max_num_seqs, shape.vocab_size, device.torch_device)
    device.synchronise()
    device.submit(lambda: _begin_sampling(state, config)).wait()
    layer_bytes = _taken_bytes(device, lambda: _run_layers(device, model, config, kv_N2KPD))
    head_bytes = _taken_bytes(device, lambda: _run_head(model, config, state))
    return max(layer_bytes, head_bytes) + state.num_bytes


def _taken_bytes(device: Device, work: Callable[[], None]) -> int:
    """What the allocator takes from the GPU for `work`, once what `work` loads and keeps is there."""
    device.submit(work).wait()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device.torch_device)
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    device.submit(work).wait()
    return torch.cuda.max_memory_reserved(device.torch_device) - before


def _run_layers(device: Device, model: Decoder, config: ResolvedConfig, kv_N2KPD: torch.Tensor) -> None:
    """Two layers of a lap that is one prompt, beside another lap with a row for each sequence."""
    num_rows, num_decodes = config.max_num_batched_tokens, config.max_num_seqs
    prompt = _batch(np.array([num_rows]), np.array([len(kv_N2KPD)]), np.array([num_rows]))
    decodes = _batch(*(np.ones(num_decodes, dtype=np.int64) for _ in range(3)))
    laps = [(EagerLinear(model), batch, device.ops.plan_attention(batch, decode=batch is decodes))
            for batch in (prompt, decodes)]  # fmt: skip
    for linear, batch, _ in laps:
        zeros_T = torch.zeros(batch.num_rows, dtype=torch.int64, device=device.torch_device)
        linear.embed(zeros_T, zeros_T)
    for layer in range(min(2, config.shape.num_layers)):
        for linear, _, attention in laps:
            linear.pre(layer)
            attention.run(*split_qkv(linear.qkv_TCD, config.shape), kv_N2KPD, linear.attn_THD)
        for linear, _, _ in laps:
            linear.post(layer)


def _batch(rows: np.ndarray, blocks: np.ndarray, lengths: np.ndarray) -> PagedBatch:
    return PagedBatch(
        row_start=np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        block_start=np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32),
        block_ids=np.zeros(blocks.sum(), dtype=np.int32),
        lengths=lengths.astype(np.int32),
    )


def _sampled_rows(config: ResolvedConfig) -> tuple[Rows, ...]:
    """A group of rows that the head samples at once."""
    no_blocks = np.zeros(0, dtype=np.int32)
    return tuple(
        Rows(str(slot), slot, Tier.DEVICE, 1, 1, None, no_blocks, (), True, 1)
        for slot in range(min(GROUP_ROWS, config.max_num_seqs))
    )


def _begin_sampling(state: SamplingState, config: ResolvedConfig) -> None:
    """Requests that ask for all that a request can."""
    params = SamplingParams(
        temperature=1.0, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.1, logit_bias={0: 1.0}
    )
    for rows in _sampled_rows(config):
        state.add(rows.slot, Request(rows.request_id, (0,), params, (), 0.0))


def _run_head(model: Decoder, config: ResolvedConfig, state: SamplingState) -> None:
    """Log-probabilities and sampling of a group of rows."""
    rows = _sampled_rows(config)
    logits_BV = model.head(model.embed(torch.zeros(len(rows), dtype=torch.int64, device=model.weights.head_VE.device)))
    ids_B = state.sample(logits_BV, state.batch(rows))
    token_logprobs(logits_BV, ids_B, min(MAX_LOGPROBS, config.shape.vocab_size))
