"""Everything in this folder needs an NVIDIA GPU; elsewhere it is skipped without being imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from neoserve.core.config import ModelShape

if TYPE_CHECKING:
    from neoserve.device.cuda import CudaDevice

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def attention_shape(num_query_heads: int, num_kv_heads: int, head_dim: int) -> ModelShape:
    """A model of which only the attention heads matter."""
    return ModelShape(
        num_layers=1,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=num_query_heads * head_dim,
        ffn_size=256,
        vocab_size=128,
        max_position=4096,
        tied_embeddings=False,
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    """The GPU, for a model with 8 query heads on 2 kv heads of dimension 64."""
    from neoserve.device.cuda import CudaDevice, usable_dtype

    device = CudaDevice(attention_shape(8, 2, 64), usable_dtype("bfloat16"), 16)
    yield device
    device.close()
