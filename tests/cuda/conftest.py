"""Everything in this folder needs an NVIDIA GPU; elsewhere it is skipped without being imported."""

import pytest
import torch

from neoserve.core.config import ModelShape

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
