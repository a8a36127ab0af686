"""The operations of a decoder layer on an NVIDIA GPU, by FlashInfer where it has them.

FlashInfer compiles each kernel at its first use (tens of seconds, then cached on disk).

Shape letters: T rows, B sequences, H query heads, K kv heads, D head dim, E model dim, F ffn dim, N blocks,
P tokens per block, L layers, X = 2KPD values of a host block.
"""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch

from neoserve.core.config import ModelShape
from neoserve.core.errors import ConfigError, UnsupportedModelError
from neoserve.kernels.activation import silu_and_mul_in_place
from neoserve.kernels.base import DecodePlans, Ops, PagedAttention, PagedBatch
from neoserve.kernels.block_copy import MappedCopies
from neoserve.kernels.flashinfer_setup import flashinfer
from neoserve.kernels.paged_attention import DecodeBuckets, PagedGeometry, PlannedAttention, Planner

HEAD_DIMS = (64, 128, 256)


class FlashInferOps(Ops):
    """FlashInfer's kernels for one model shape on one GPU.

    Raises `UnsupportedModelError` for a head dim that the kernels lack, `ConfigError` for float32.
    """

    _decodes: ClassVar[bool] = True
    """Whether FlashInfer decodes, and needs memory for that."""

    block_copies = MappedCopies

    def __init__(self, shape: ModelShape, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        if shape.head_dim not in HEAD_DIMS:
            raise UnsupportedModelError(
                f"head dim {shape.head_dim} has no GPU attention kernel; expected one of {HEAD_DIMS}"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"dtype {dtype} cannot run on a GPU here; expected bfloat16 or float16")
        self._geometry = PagedGeometry(shape.num_query_heads, shape.num_kv_heads, shape.head_dim, block_size, dtype)
        self._device = device
        self._workspace = self._geometry.workspace(device, decode=self._decodes)
        self._idle: dict[bool, list[Planner]] = {False: [], True: []}

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        normed: torch.Tensor = flashinfer.rmsnorm(x_TE, weight_E, eps)
        return normed

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> torch.Tensor:
        flashinfer.fused_add_rmsnorm(x_TE, residual_TE, weight_E, eps)
        return x_TE

    def rope(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cache_PD: torch.Tensor) -> None:
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions_T, q_THD, k_TKD, q_THD.shape[-1], cache_PD)

    def silu_and_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return silu_and_mul_in_place(gate_up_T2F)

    def plan_attention(self, batch: PagedBatch, *, decode: bool) -> PagedAttention:
        """As `Ops.plan_attention`. A plan's buffers serve another lap once the returned object is dropped."""
        idle = self._idle[decode]
        planner = idle.pop() if idle else Planner(self._geometry, self._workspace, decode=decode)
        attention = PlannedAttention(planner, planner.plan(batch))
        weakref.finalize(attention, idle.append, planner)
        return attention

    def decode_plans(self, sizes: tuple[int, ...], max_blocks: int, padding_block: int) -> DecodePlans:
        return DecodeBuckets(self._geometry, self._workspace, sizes, max_blocks, padding_block)
