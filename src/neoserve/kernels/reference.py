"""The operations of a decoder layer in readable torch: what `ReferenceDevice` runs, and what faster ones must equal.

Rounding follows transformers: norms and rope compute in float32, norms round to the model's dtype before the weight.

Shape letters: T rows, t rows of one sequence, S its tokens in the KV, n its blocks, H query heads, K kv heads,
D head dim, E model dim, F ffn dim, L layers, N blocks, P tokens per block, X values of a block (or of its part).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from neoserve.kernels.base import BlockCopies, DecodePlans, Ops, PagedAttention, PagedBatch
from neoserve.kernels.host_attention import from_host_layout, to_host_layout
from neoserve.kernels.paged_arrays import bucket_size, pad_decode


class ReferenceCopies(BlockCopies):
    """`BlockCopies` by index."""

    def run(self, layer: int, host_layer: int, num_layers: int = 1) -> None:
        kv_LN2KPD, host_LNX = self.kv_LN2KPD[layer:][:num_layers], self.host_LNX[host_layer:][:num_layers]
        num_blocks = len(self.block_ids_N)
        if self.to_host:
            tiles = to_host_layout(kv_LN2KPD.index_select(1, self.block_ids_N).flatten(0, 1))
            host_LNX.index_copy_(1, self.host_block_ids_N, tiles.view(num_layers, num_blocks, -1))
            return
        num_kv_heads, block_size, head_dim = kv_LN2KPD.shape[3:]
        blocks = host_LNX.index_select(1, self.host_block_ids_N)
        blocks_NK2X = blocks.view(num_layers * num_blocks, num_kv_heads, 2, block_size * head_dim)
        blocks_N2KPD = from_host_layout(blocks_NK2X, head_dim)
        kv_LN2KPD.index_copy_(1, self.block_ids_N, blocks_N2KPD.view(num_layers, num_blocks, *kv_LN2KPD.shape[2:]))


class ReferenceOps(Ops):
    """Operations on CPU tensors in float32, bfloat16 or float16."""

    block_copies = ReferenceCopies

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        x32_TE = x_TE.float()
        scale_T1 = torch.rsqrt(x32_TE.square().mean(-1, keepdim=True) + eps)
        return (x32_TE * scale_T1).to(x_TE.dtype) * weight_E

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual_TE.add_(x_TE)
        return self.rms_norm(residual_TE, weight_E, eps)

    def rope(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cache_PD: torch.Tensor) -> None:
        cos_T1d, sin_T1d = cache_PD.index_select(0, positions_T).unsqueeze(1).chunk(2, dim=-1)
        for x in (q_THD, k_TKD):
            first, second = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * cos_T1d - second * sin_T1d, second * cos_T1d + first * sin_T1d), dim=-1))

    def silu_and_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF

    def plan_attention(self, batch: PagedBatch, *, decode: bool) -> PagedAttention:
        return ReferenceAttention(batch)

    def decode_plans(self, sizes: tuple[int, ...], max_blocks: int, padding_block: int) -> DecodePlans:
        return ReferencePlans(sizes, padding_block)


class ReferenceAttention:
    """Attention of one lap's rows, one sequence after another, so that no sequence's result depends on the others."""

    def __init__(self, batch: PagedBatch) -> None:
        counts = np.diff(batch.row_start)
        # Row r of a sequence is its token `length - count + r`.
        first_position = np.repeat(batch.lengths - counts - batch.row_start[:-1], counts)
        position_T = first_position + np.arange(batch.num_rows)
        self._position_T = torch.from_numpy(position_T.astype(np.int64))
        self._block_start_T = torch.from_numpy(np.repeat(batch.block_start[:-1], counts).astype(np.int64))
        self._block_ids = torch.from_numpy(batch.block_ids.astype(np.int64))
        self._batch = batch

    def _append(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv_N2KPD: torch.Tensor) -> None:
        block_size = kv_N2KPD.shape[3]
        block_T = self._block_ids[self._block_start_T + self._position_T // block_size]
        offset_T = self._position_T % block_size
        kv_N2KPD[block_T, 0, :, offset_T] = k_TKD
        kv_N2KPD[block_T, 1, :, offset_T] = v_TKD

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self._append(k_TKD, v_TKD, kv_N2KPD)
        batch = self._batch
        for index, length in enumerate(batch.lengths.tolist()):
            rows = slice(int(batch.row_start[index]), int(batch.row_start[index + 1]))
            blocks = slice(int(batch.block_start[index]), int(batch.block_start[index + 1]))
            out_THD[rows] = attend(q_THD[rows], kv_N2KPD, self._block_ids[blocks], length)


class ReferenceBucket:
    """A plan that is made again in place."""

    def __init__(self) -> None:
        self.planned = ReferenceAttention(_NO_ROWS)

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self.planned.run(q_THD, k_TKD, v_TKD, kv_N2KPD, out_THD)


class ReferencePlans:
    """`kernels.base.DecodePlans`."""

    def __init__(self, sizes: tuple[int, ...], padding_block: int) -> None:
        self.sizes = tuple(sorted(sizes))
        self._padding_block = padding_block
        self._buckets = {size: ReferenceBucket() for size in self.sizes}

    def bucket(self, num_sequences: int) -> ReferenceBucket:
        return self._buckets[bucket_size(self.sizes, num_sequences)]

    def plan(self, batch: PagedBatch) -> ReferenceBucket:
        size = bucket_size(self.sizes, batch.num_sequences)
        self._buckets[size].planned = ReferenceAttention(pad_decode(batch, size, self._padding_block))
        return self._buckets[size]


_NO_ROWS = PagedBatch(*(np.zeros(size, dtype=np.int32) for size in (1, 1, 0, 0)))


def attend(q_tHD: torch.Tensor, kv_N2KPD: torch.Tensor, block_ids_n: torch.Tensor, length: int) -> torch.Tensor:
    """Attention of a sequence's last t rows over its `length` tokens, causal, in float32: out_tHD, float32."""
    num_rows, block_size = q_tHD.shape[0], kv_N2KPD.shape[3]
    num_blocks = -(-length // block_size)
    kv_2KnPD = kv_N2KPD.index_select(0, block_ids_n[:num_blocks]).permute(1, 2, 0, 3, 4)
    k_KSD, v_KSD = kv_2KnPD.flatten(2, 3)[:, :, :length].float()
    position_t1 = torch.arange(length - num_rows, length).unsqueeze(1)
    mask_tS = None if num_rows == 1 else torch.arange(length) <= position_t1
    out_1HtD = functional.scaled_dot_product_attention(
        q_tHD.float().transpose(0, 1).unsqueeze(0), k_KSD.unsqueeze(0), v_KSD.unsqueeze(0), mask_tS, enable_gqa=True
    )
    return out_1HtD.squeeze(0).transpose(0, 1)
