"""The decoder run the plain way: one sequence, layer after layer, no program, no second tier. What modes must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from neoserve.kernels.base import Ops, PagedBatch
from neoserve.models.decoder import Decoder, split_qkv


class PlainLoop:
    """One sequence with its own paged KV, whose blocks lie in shuffled order with spare ones between."""

    def __init__(self, decoder: Decoder, ops: Ops, dtype: torch.dtype, *, max_tokens: int, block_size: int) -> None:
        shape = decoder.shape
        self._decoder, self._ops, self._block_size = decoder, ops, block_size
        num_blocks = -(-max_tokens // block_size)
        self._block_ids = np.random.default_rng(0).permutation(num_blocks + 3)[:num_blocks].astype(np.int32)
        size = (num_blocks + 3, 2, shape.num_kv_heads, block_size, shape.head_dim)
        self._kv_LN2KPD = [torch.full(size, torch.nan, dtype=dtype) for _ in range(shape.num_layers)]
        self._length = 0

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits, float32 [tokens, vocabulary], of the sequence's next tokens, run as one chunk."""
        start, self._length = self._length, self._length + len(token_ids)
        num_blocks = -(-self._length // self._block_size)
        batch = PagedBatch(
            row_start=np.array([0, len(token_ids)], np.int32),
            block_start=np.array([0, num_blocks], np.int32),
            block_ids=self._block_ids[:num_blocks],
            lengths=np.array([self._length], np.int32),
        )
        decoder, shape = self._decoder, self._decoder.shape
        attention = self._ops.plan_attention(batch, decode=len(token_ids) == 1)
        positions_T = torch.arange(start, self._length)
        x_TE, residual_TE = decoder.embed(torch.tensor(token_ids)), None
        for layer, kv_N2KPD in zip(decoder.layers, self._kv_LN2KPD, strict=True):
            qkv_TCD, residual_TE = layer.before_attention(x_TE, residual_TE, positions_T)
            q_THD, k_TKD, v_TKD = split_qkv(qkv_TCD, shape)
            attn_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
            attention.run(q_THD, k_TKD, v_TKD, kv_N2KPD, attn_THD)
            x_TE, residual_TE = layer.after_attention(attn_THD, residual_TE)
        return decoder.head(x_TE)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The `num_tokens` likeliest tokens after `prompt`, one at a time."""
        tokens, chunk = list[int](), list(prompt)
        while len(tokens) < num_tokens:
            chunk = [int(self.logits(chunk)[-1].argmax())]
            tokens += chunk
        return tokens
