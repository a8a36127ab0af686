"""The operations of a decoder layer, as every device offers them.

Implementations: `kernels/flashinfer_ops.py` (an NVIDIA GPU), `kernels/fused_ops.py` (the same, with kernels of our own
for laps of few rows) and `kernels/reference.py` (readable torch on the CPU).

Shape letters: T rows, B sequences, H query heads, K kv heads, D head dim, E model dim, F ffn dim, N blocks,
P tokens per block. The device's KV of one layer is `kv_N2KPD`: K at index 0, V at index 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences whose new rows attend to their paged KV. All arrays int32, on the host.

    row_start: [B + 1] cumulative number of rows of each sequence (first is 0).
    block_start: [B + 1] cumulative number of blocks. block_ids: [block_start[-1]] block tables, one after another.
    lengths: [B] tokens in the KV once this lap's rows are appended; the rows are the last ones, causal.
    """

    row_start: np.ndarray
    block_start: np.ndarray
    block_ids: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


class PagedAttention(Protocol):
    """One `PagedBatch` planned for a device: built once a lap, run once a layer, always with the same memory for what
    lies in between."""

    def run(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_N2KPD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        """Write the rows' k and v at their places in the paged KV; causal attention of the rows over their sequences'
        KV, softmax scale D**-0.5, into `out_THD`. q, k and v may be views of fused rows."""


@dataclass(eq=False)
class BlockCopies(ABC):
    """Copies of the same blocks, of any layers, to the host pool or from it, changing the layout
    (csrc/attention/attention.h).

    block_ids_N, host_block_ids_N: int64, on the device, of one length; they index dimension 1 of the two pools.
    host_LNX: the host pool, X = 2KPD values a block.
    """

    kv_LN2KPD: torch.Tensor
    block_ids_N: torch.Tensor
    host_LNX: torch.Tensor
    host_block_ids_N: torch.Tensor
    to_host: bool = field(kw_only=True)

    @abstractmethod
    def run(self, layer: int, host_layer: int, num_layers: int = 1) -> None:
        """Copy `num_layers` layers, those from `layer` on of the device's, those from `host_layer` on of the host's."""


class DecodePlans(Protocol):
    """Decode plans that are made again in place, one for each number of sequences in `sizes` (growing): work that runs
    one can be recorded, and serves every later batch. A plan overwrites the one before, in stream order."""

    sizes: tuple[int, ...]

    def bucket(self, num_sequences: int) -> PagedAttention:
        """The plan of the smallest size that `num_sequences` fit in; raises ValueError when none does."""

    def plan(self, batch: PagedBatch) -> PagedAttention:
        """Plan `bucket(batch.num_sequences)` for a decode batch; rows that fill it up write to the padding block."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What makes q, k and v of fused rows: H query heads, K kv heads, their norms if any, and rope.

    norms: weights [D] of the q heads' norm and of the k heads', `None` without. cache_PD: as of `Ops.rope`.
    """

    num_query_heads: int
    num_kv_heads: int
    norms: tuple[torch.Tensor, torch.Tensor] | None
    norm_eps: float
    cache_PD: torch.Tensor

    def split(self, qkv_TCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views q_THD, k_TKD and v_TKD of fused rows."""
        sizes = [self.num_query_heads, self.num_kv_heads, self.num_kv_heads]
        q_THD, k_TKD, v_TKD = torch.split(qkv_TCD, sizes, dim=-2)
        return q_THD, k_TKD, v_TKD


class Ops(ABC):
    """The operations of a decoder layer on one device. Tensors are on the device, in the model's dtype.

    Those that begin with a linear layer (weights are [out, in], biases may be `None`) are made of the others here; a
    device that can do better overrides them.
    """

    block_copies: ClassVar[type[BlockCopies]]
    """How the device copies blocks between the tiers."""

    def linear_heads(
        self,
        x_TE: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        heads: Heads,
        positions_T: torch.Tensor,
    ) -> torch.Tensor:
        """`qkv_TCD`, contiguous: q heads, then k heads, both normed and rotated, then v heads."""
        head_dim = heads.cache_PD.shape[1]
        qkv_TCD = functional.linear(x_TE, weight, bias).view(x_TE.shape[0], -1, head_dim)
        q_THD, k_TKD, _ = heads.split(qkv_TCD)
        if heads.norms is not None:
            for x, norm_D in zip((q_THD, k_TKD), heads.norms, strict=True):
                x.copy_(self.rms_norm(x, norm_D, heads.norm_eps))
        self.rope(q_THD, k_TKD, positions_T, heads.cache_PD)
        return qkv_TCD

    def linear_add_rms_norm(
        self,
        x_TF: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual_TE: torch.Tensor,
        norm_E: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """residual += linear(x) in place; returns rms_norm(residual)."""
        return self.add_rms_norm(functional.linear(x_TF, weight, bias), residual_TE, norm_E, eps)

    def linear_silu_and_mul(self, x_TE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu_and_mul(linear(x))."""
        return self.silu_and_mul(functional.linear(x_TE, weight, bias))

    def logits(self, x_TE: torch.Tensor, head_VE: torch.Tensor) -> torch.Tensor:
        """linear(x) as float32."""
        return functional.linear(x_TE, head_VE).float()

    @abstractmethod
    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (any leading shape), mean in fp32."""

    @abstractmethod
    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x in place; returns rms_norm(residual). `x_TE` may be overwritten by the result."""

    @abstractmethod
    def rope(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cache_PD: torch.Tensor) -> None:
        """Rotate q and k in place (NeoX halves). cache_PD: fp32, a row per position: D/2 cosines, then D/2 sines.

        q and k may be strided views into a fused qkv row. positions_T is int32 or int64.
        """

    @abstractmethod
    def silu_and_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """silu(first half of the last dimension) * second half; may be in place, a view of its first half."""

    @abstractmethod
    def plan_attention(self, batch: PagedBatch, *, decode: bool) -> PagedAttention:
        """Plan attention for a lap. `decode` promises one row a sequence."""

    @abstractmethod
    def decode_plans(self, sizes: tuple[int, ...], max_blocks: int, padding_block: int) -> DecodePlans:
        """Plans for recorded decode laps.

        max_blocks: of all sequences of a batch together. padding_block: a block that belongs to no sequence.
        """
