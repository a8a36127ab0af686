"""The decoder that runs every family. It owns no loop over its layers: `core.program` says what runs when.

Of each layer there is what comes before attention and what comes after. `x` is the output of the last block, not yet
added to the residual stream: adding and normalising are one operation (`Ops.add_rms_norm`), so the sum

    residual += x;  h = norm(residual)

happens at the head of the next block, exactly the numbers of `residual = residual + x` at the end of this one.

Nothing here waits on the host or has shapes that depend on data, so all of it can be captured in a CUDA graph.

Shape letters: T rows, B rows that are sampled, H query heads, K kv heads, C = H + 2 K fused heads, D head dim,
E model dim, F ffn dim, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from neoserve.core.config import ModelShape
from neoserve.kernels.base import Ops
from neoserve.models.rope import rope_cache
from neoserve.models.spec import ModelSpec
from neoserve.models.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: norm, q k v, rope | attention, which is not ours | output projection, norm, MLP."""

    shape: ModelShape
    norm_eps: float
    weights: LayerWeights
    rope_cache_PD: torch.Tensor
    ops: Ops

    def before_attention(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The fused rows `qkv_TCD`, contiguous, after rope (q heads, then k heads, then v heads), and the residual.

        residual_TE is `None` in the first layer, whose x begins the residual stream; otherwise x is added to it in
        place. `split_qkv` gives the views of the parts.
        """
        weights, ops = self.weights, self.ops
        if residual_TE is None:
            residual_TE = x_TE
            h_TE = ops.rms_norm(x_TE, weights.input_norm_E, self.norm_eps)
        else:
            h_TE = ops.add_rms_norm(x_TE, residual_TE, weights.input_norm_E, self.norm_eps)
        qkv_TCD = functional.linear(h_TE, weights.qkv, weights.qkv_bias).view(x_TE.shape[0], -1, self.shape.head_dim)
        q_THD, k_TKD, _ = split_qkv(qkv_TCD, self.shape)
        if weights.q_norm_D is not None and weights.k_norm_D is not None:
            q_THD.copy_(ops.rms_norm(q_THD, weights.q_norm_D, self.norm_eps))
            k_TKD.copy_(ops.rms_norm(k_TKD, weights.k_norm_D, self.norm_eps))
        ops.rope(q_THD, k_TKD, positions_T, self.rope_cache_PD)
        return qkv_TCD, residual_TE

    def after_attention(self, attn_THD: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the residual for the next layer, from the attention output; the residual is updated in place."""
        weights, ops = self.weights, self.ops
        x_TE = functional.linear(attn_THD.flatten(-2), weights.output, weights.output_bias)
        h_TE = ops.add_rms_norm(x_TE, residual_TE, weights.post_norm_E, self.norm_eps)
        h_TF = ops.silu_and_mul(functional.linear(h_TE, weights.gate_up, weights.gate_up_bias))
        return functional.linear(h_TF, weights.down, weights.down_bias), residual_TE


class Decoder:
    """A model on one device: embedding, layers, head.

    num_positions: rows of the rope table, at least the longest sequence to be served (`None`: the model's maximum).
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, ops: Ops, num_positions: int | None = None) -> None:
        self.shape = spec.shape
        self._norm_eps = spec.norm_eps
        self.weights = weights
        self._ops = ops
        cache_PD = rope_cache(
            spec.rope, spec.shape.head_dim, num_positions or spec.shape.max_position, weights.embedding_VE.device
        )
        self.layers: Sequence[DecoderLayer] = tuple(
            DecoderLayer(spec.shape, spec.norm_eps, layer, cache_PD, ops) for layer in weights.layers
        )

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """x_TE of int32 or int64 token ids."""
        return functional.embedding(token_ids_T, self.weights.embedding_VE)

    def head(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, row_ids_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`logits_BV`, float32, of the rows `row_ids_B` (int64; `None`: all), final norm included. Consumes x and
        the residual."""
        if row_ids_B is not None:
            x_TE, residual_TE = x_TE.index_select(0, row_ids_B), residual_TE.index_select(0, row_ids_B)
        h_BE = self._ops.add_rms_norm(x_TE, residual_TE, self.weights.final_norm_E, self._norm_eps)
        return functional.linear(h_BE, self.weights.head_VE).float()


def split_qkv(qkv_TCD: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q_THD, k_TKD and v_TKD of fused rows."""
    q_THD, k_TKD, v_TKD = torch.split(qkv_TCD, [shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads], dim=-2)
    return q_THD, k_TKD, v_TKD
