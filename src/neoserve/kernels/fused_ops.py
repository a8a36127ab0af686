"""The operations of a decoder layer on an NVIDIA GPU, with kernels of our own for laps of few rows.

Linear layers of few rows leave partial sums that the operation after them adds up (`skinny_linear`, `row_kernels`).
More rows, and sizes that the kernels cannot tile, take cuBLAS and FlashInfer, as do prompts' attention and norms.

Shape letters: T rows, E model dim, F ffn dim, V vocabulary, C fused heads, D head dim.
"""

from __future__ import annotations

import torch

from neoserve.core.config import ModelShape
from neoserve.kernels.base import DecodePlans, Heads, PagedAttention, PagedBatch
from neoserve.kernels.decode_attention import DecodeAttention, FusedDecodePlans, Partials
from neoserve.kernels.decode_plans import DecodePlanBuffer, planned
from neoserve.kernels.flashinfer_ops import FlashInferOps
from neoserve.kernels.row_kernels import add_norm, rope_heads
from neoserve.kernels.skinny_linear import Multiprocessors, fits, gated, partial_sums, split

_DEPENDENT_LAUNCH_MAJOR = 9
_ATTENTION_PROGRAMS = 4
"""Of a multiprocessor at once."""


class FusedOps(FlashInferOps):
    """`FlashInferOps`, faster for few rows. Compute capability 8.0 on."""

    _decodes = False

    def __init__(self, shape: ModelShape, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(shape, dtype, block_size, device)
        properties = torch.cuda.get_device_properties(device)
        self._dependent = properties.major >= _DEPENDENT_LAUNCH_MAJOR
        self._gpu = Multiprocessors(
            properties.multi_processor_count,
            properties.shared_memory_per_multiprocessor,
            properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        )

    def plan_attention(self, batch: PagedBatch, *, decode: bool) -> PagedAttention:
        if not decode:
            return super().plan_attention(batch, decode=False)
        num_chunks = self._num_chunks(batch.num_sequences)
        arrays = planned(batch, num_chunks, self._device)
        geometry = self._geometry
        partials = Partials.allocate(num_chunks, geometry.num_query_heads, geometry.head_dim, self._device)
        return DecodeAttention(arrays, self._dependent, partials)

    def decode_plans(self, sizes: tuple[int, ...], max_blocks: int, padding_block: int) -> DecodePlans:
        num_chunks = {size: self._num_chunks(size) for size in sizes}
        buffer = DecodePlanBuffer(num_chunks, max_blocks + max(sizes), padding_block, self._device)
        return FusedDecodePlans(sizes, buffer, dependent=self._dependent)

    def _num_chunks(self, num_sequences: int) -> int:
        """So many that their programs all run at once; of many sequences two each, so that long ones can have more."""
        at_once = _ATTENTION_PROGRAMS * self._gpu.count // self._geometry.num_kv_heads
        return max(at_once, 2 * num_sequences)

    def linear_heads(
        self,
        x_TE: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        heads: Heads,
        positions_T: torch.Tensor,
    ) -> torch.Tensor:
        if not fits(len(x_TE), *weight.shape):
            return super().linear_heads(x_TE, weight, bias, heads, positions_T)
        partials = self._partial_sums(x_TE, weight)
        return rope_heads(partials, bias, heads, positions_T, x_TE.dtype, dependent=self._dependent)

    def linear_add_rms_norm(
        self,
        x_TF: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual_TE: torch.Tensor,
        norm_E: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        if not fits(len(x_TF), *weight.shape):
            return super().linear_add_rms_norm(x_TF, weight, bias, residual_TE, norm_E, eps)
        partials = self._partial_sums(x_TF, weight)
        return add_norm(partials, bias, residual_TE, norm_E, eps, dependent=self._dependent)

    def linear_silu_and_mul(self, x_TE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not fits(len(x_TE), weight.shape[0] // 2, weight.shape[1]):
            return super().linear_silu_and_mul(x_TE, weight, bias)
        return gated(x_TE, weight, bias, self._gpu, dependent=self._dependent)

    def logits(self, x_TE: torch.Tensor, head_VE: torch.Tensor) -> torch.Tensor:
        if not fits(len(x_TE), *head_VE.shape):
            return super().logits(x_TE, head_VE)
        partials = self._partial_sums(x_TE, head_VE)
        return partials[0] if len(partials) == 1 else partials.sum(0)

    def _partial_sums(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        share = split(len(x_TK), weight_NK, self._gpu)
        return partial_sums(x_TK.contiguous(), weight_NK, share, dependent=self._dependent)
