"""The decoder that runs every family. It owns no loop over its layers: `core.program` says what runs when.

Of each layer there is what comes before attention and what comes after. `residual` is the residual stream, updated in
place; `x` is it, normed for what comes next. So the sum

    residual += linear(...);  x = norm(residual)

is one operation at the end of a block, whose norm is that of the next block: of the same layer, of the next layer, or
of the head.

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
from neoserve.kernels.base import Heads, Ops
from neoserve.models.rope import rope_cache
from neoserve.models.spec import ModelSpec
from neoserve.models.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: q k v, rope | attention, which is not ours | output projection, norm, MLP, norm of what follows.

    next_norm_E: the norm that the next layer begins with, or the head.
    """

    weights: LayerWeights
    heads: Heads
    next_norm_E: torch.Tensor
    norm_eps: float
    ops: Ops

    def before_attention(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The fused rows `qkv_TCD`, contiguous, after rope (q heads, then k heads, then v heads), and the residual.

        residual_TE is `None` in the first layer, whose x, the embedded tokens, begins the residual stream.
        `split_qkv` gives the views of the parts.
        """
        weights = self.weights
        if residual_TE is None:
            residual_TE = x_TE
            x_TE = self.ops.rms_norm(x_TE, weights.input_norm_E, self.norm_eps)
        return self.ops.linear_heads(x_TE, weights.qkv, weights.qkv_bias, self.heads, positions_T), residual_TE

    def after_attention(self, attn_THD: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the residual for the next layer, from the attention output; the residual is updated in place."""
        weights, ops, eps = self.weights, self.ops, self.norm_eps
        x_TE = ops.linear_add_rms_norm(
            attn_THD.flatten(-2), weights.output, weights.output_bias, residual_TE, weights.post_norm_E, eps
        )
        del attn_THD  # what is no longer read need not lie beside the MLP's activations, the widest of all
        h_TF = ops.linear_silu_and_mul(x_TE, weights.gate_up, weights.gate_up_bias)
        del x_TE
        x_TE = ops.linear_add_rms_norm(h_TF, weights.down, weights.down_bias, residual_TE, self.next_norm_E, eps)
        return x_TE, residual_TE


class Decoder:
    """A model on one device: embedding, layers, head.

    num_positions: rows of the rope table, at least the longest sequence to be served (`None`: the model's maximum).
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, ops: Ops, num_positions: int | None = None) -> None:
        self.shape = spec.shape
        self.weights = weights
        self._ops = ops
        cache_PD = rope_cache(
            spec.rope, spec.shape.head_dim, num_positions or spec.shape.max_position, weights.embedding_VE.device
        )
        next_norms = [*(layer.input_norm_E for layer in weights.layers[1:]), weights.final_norm_E]
        self.layers: Sequence[DecoderLayer] = tuple(
            DecoderLayer(layer, _heads(spec, layer, cache_PD), next_norm_E, spec.norm_eps, ops)
            for layer, next_norm_E in zip(weights.layers, next_norms, strict=True)
        )

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """x_TE of int32 or int64 token ids."""
        return functional.embedding(token_ids_T, self.weights.embedding_VE)

    def head(self, x_TE: torch.Tensor, row_ids_B: torch.Tensor | None = None) -> torch.Tensor:
        """`logits_BV`, float32, of the rows `row_ids_B` (int64; `None`: all) of what the last layer returned."""
        if row_ids_B is not None:
            x_TE = x_TE.index_select(0, row_ids_B)
        return self._ops.logits(x_TE, self.weights.head_VE)


def _heads(spec: ModelSpec, layer: LayerWeights, cache_PD: torch.Tensor) -> Heads:
    norms = None if layer.q_norm_D is None or layer.k_norm_D is None else (layer.q_norm_D, layer.k_norm_D)
    return Heads(spec.shape.num_query_heads, spec.shape.num_kv_heads, norms, spec.norm_eps, cache_PD)


def split_qkv(qkv_TCD: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q_THD, k_TKD and v_TKD of fused rows."""
    q_THD, k_TKD, v_TKD = torch.split(qkv_TCD, [shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads], dim=-2)
    return q_THD, k_TKD, v_TKD
