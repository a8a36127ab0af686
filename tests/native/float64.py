"""Decode attention of the host tier, computed from its definition in float64."""

from dataclasses import dataclass

import numpy as np
import torch

from neoserve import _native
from neoserve.kernels.host_attention import allocate_host_kv, from_host_layout, host_attention, to_host_layout

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Geometry:
    num_layers: int = 2
    num_query_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


class HostRows:
    """Random KV, one row of q, k, v for each of `lengths`, and the laps of a pool over them.

    Legend as in neoserve.kernels.host_attention, and B rows, H query heads.
    """

    def __init__(
        self, pool: _native.WorkerPool, geometry: Geometry, lengths: list[int], instruction_set: str | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
        self.geometry = geometry
        self.lengths = np.array(lengths, np.int32)
        blocks = -(-self.lengths // geometry.block_size)
        self.block_start = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32)
        num_blocks = int(self.block_start[-1]) + 3
        self.block_ids = torch.randperm(num_blocks, generator=generator)[:-3].numpy().astype(np.int32)
        self.kv_LNK2X = allocate_host_kv(
            num_layers=geometry.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            block_size=geometry.block_size,
            dtype=geometry.dtype,
        )
        for kv_NK2X in self.kv_LNK2X:
            shape = (num_blocks, 2, geometry.num_kv_heads, geometry.block_size, geometry.head_dim)
            kv_NK2X.copy_(to_host_layout(torch.randn(shape, generator=generator).to(geometry.dtype)))
        num_heads = geometry.num_query_heads + 2 * geometry.num_kv_heads
        self.qkv_BHD = torch.randn(len(lengths), num_heads, geometry.head_dim, generator=generator).to(geometry.dtype)
        self.out_BHD = torch.zeros(len(lengths), geometry.num_query_heads, geometry.head_dim, dtype=geometry.dtype)
        self.lse_BH = torch.zeros(len(lengths), geometry.num_query_heads)
        self.attention = host_attention(
            pool,
            self.kv_LNK2X,
            num_query_heads=geometry.num_query_heads,
            head_dim=geometry.head_dim,
            instruction_set=instruction_set,
        )

    def plan(self) -> _native.Lap:
        return self.attention.plan(
            self.lengths,
            self.block_start,
            self.block_ids,
            qkv_address=self.qkv_BHD.data_ptr(),
            out_address=self.out_BHD.data_ptr(),
            lse_address=self.lse_BH.data_ptr(),
        )

    def check(self, layer: int) -> None:
        """Assert that `out_BHD` and `lse_BH` are those of `layer`."""
        tolerance = TOLERANCE[self.geometry.dtype]
        for row in range(len(self.lengths)):
            out_HD, lse_H = self._reference(layer, row)
            error = (self.out_BHD[row].double() - out_HD).norm() / out_HD.norm()
            assert error <= tolerance, f"row {row} of length {self.lengths[row]}: relative error {error:.1e}"
            torch.testing.assert_close(self.lse_BH[row].double(), lse_H, rtol=0, atol=10 * tolerance)

    def _reference(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        geometry, length = self.geometry, int(self.lengths[row])
        q_HD, k_KD, v_KD = (
            self.qkv_BHD[row].double().split([geometry.num_query_heads, geometry.num_kv_heads, geometry.num_kv_heads])
        )
        table = self.block_ids[self.block_start[row] : self.block_start[row + 1]].tolist()
        kv_N2KPD = from_host_layout(self.kv_LNK2X[layer][table], geometry.head_dim).double()
        kv_2KTD = kv_N2KPD.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        torch.testing.assert_close(kv_2KTD[:, :, -1], torch.stack([k_KD, v_KD]), rtol=0, atol=0)  # appended
        group = geometry.num_query_heads // geometry.num_kv_heads
        k_HTD, v_HTD = kv_2KTD.repeat_interleave(group, dim=1)
        scores_HT = torch.einsum("hd,htd->ht", q_HD, k_HTD) * geometry.head_dim**-0.5
        return torch.einsum("ht,htd->hd", scores_HT.softmax(1), v_HTD), scores_HT.logsumexp(1)
