"""The decoder's layers, apart from attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neoserve.kernels.reference import ReferenceOps
from neoserve.models.checkpoint import open_checkpoint
from neoserve.models.decoder import MLP_ROWS, Decoder
from neoserve.models.weights import load_weights
from tests.families import save_family


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
@pytest.mark.parametrize("num_rows", [MLP_ROWS, MLP_ROWS + 1, 3 * MLP_ROWS - 5])
def test_many_rows_pass_through_the_mlp_in_parts(family: str, num_rows: int, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    spec = open_checkpoint(str(tmp_path)).spec
    weights = load_weights(spec, tmp_path, torch.float32, torch.device("cpu"))
    layer = Decoder(spec, weights, ReferenceOps()).layers[0]
    attn_THD = torch.randn(num_rows, spec.shape.num_query_heads, spec.shape.head_dim)
    residual_TE = torch.randn(num_rows, spec.shape.hidden_size)
    few = [
        layer.after_attention(attn, residual.clone())
        for attn, residual in zip(attn_THD.split(100), residual_TE.split(100), strict=True)
    ]
    for found, parts in zip(layer.after_attention(attn_THD, residual_TE), zip(*few, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts))
