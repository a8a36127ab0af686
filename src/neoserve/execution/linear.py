"""The linear work of a lap: everything but attention, and the tensors that lie between the two.

Shape letters: T rows, C = H + 2K heads of a fused qkv row, H query heads, K kv heads, D head dim, E model dim.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch

from neoserve.core.config import ModelShape
from neoserve.models.decoder import Decoder, split_qkv


class AttentionRows(NamedTuple):
    """What attention reads of some rows, and where it writes: views."""

    q_THD: torch.Tensor
    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    out_THD: torch.Tensor

    @classmethod
    def of(cls, qkv_TCD: torch.Tensor, attn_THD: torch.Tensor, rows: slice, shape: ModelShape) -> AttentionRows:
        """Those of `rows` of a lap's tensors."""
        return cls(*split_qkv(qkv_TCD[rows], shape), attn_THD[rows])


class Linear(Protocol):
    """The linear work of one lap's rows, on the stream: `embed`, then `pre` and `post` of each layer in turn.

    qkv_TCD: what `pre` made. attn_THD: where attention writes, and what `post` reads. x_TE: what the last `post` left
    for the head. stays: whether those are the same tensors for all layers.
    """

    stays: ClassVar[bool]

    @property
    def qkv_TCD(self) -> torch.Tensor: ...

    @property
    def attn_THD(self) -> torch.Tensor: ...

    @property
    def x_TE(self) -> torch.Tensor: ...

    def embed(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Begin with rows of these tokens (int64) at these positions (int64)."""

    def pre(self, layer: int) -> None:
        """Norm, q k v projection, rope."""

    def attention_rows(self, rows: slice) -> AttentionRows:
        """Some of the rows between `pre` and `post`."""

    def post(self, layer: int, row_ids_B: torch.Tensor | None = None) -> None:
        """Output projection and MLP.

        row_ids_B: int64, in the last layer: those rows only, which `x_TE` then begins with; `None`: all.
        """


_NOTHING = torch.empty(0)


class EagerLinear:
    """`Linear`, enqueued kernel by kernel, in tensors of the lap's own, each given back once nobody reads it."""

    stays: ClassVar[bool] = False

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._positions_T = _NOTHING
        self.x_TE = self.residual_TE = self.qkv_TCD = self.attn_THD = _NOTHING

    def embed(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        self._positions_T = positions_T
        self.x_TE = self._model.embed(token_ids_T)

    def pre(self, layer: int) -> None:
        residual_TE = self.residual_TE if layer else None
        decoder_layer = self._model.layers[layer]
        self.qkv_TCD, self.residual_TE = decoder_layer.before_attention(self.x_TE, residual_TE, self._positions_T)
        self.x_TE = _NOTHING
        num_rows, _, head_dim = self.qkv_TCD.shape
        self.attn_THD = self.qkv_TCD.new_empty((num_rows, self._model.shape.num_query_heads, head_dim))

    def attention_rows(self, rows: slice) -> AttentionRows:
        return AttentionRows.of(self.qkv_TCD, self.attn_THD, rows, self._model.shape)

    def post(self, layer: int, row_ids_B: torch.Tensor | None = None) -> None:
        self.qkv_TCD = _NOTHING
        if row_ids_B is not None:
            self.attn_THD, self.residual_TE = (
                tensor.index_select(0, row_ids_B) for tensor in (self.attn_THD, self.residual_TE)
            )
        self.x_TE, self.residual_TE = self._model.layers[layer].after_attention(self._take_attn(), self.residual_TE)

    def _take_attn(self) -> torch.Tensor:
        """What attention wrote, which is then the taker's alone."""
        attn_THD, self.attn_THD = self.attn_THD, _NOTHING
        return attn_THD
