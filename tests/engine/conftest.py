"""One tiny Llama for tests that need any model at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.families import save_family


@dataclass(frozen=True)
class Tiny:
    """A checkpoint directory, and the transformers model saved there (float32, vocabulary of 128)."""

    path: str
    model: PreTrainedModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory: Path = tmp_path_factory.mktemp("tiny")
    model = save_family("llama", directory, head_dim=64, num_hidden_layers=3, max_position_embeddings=512)
    return Tiny(str(directory), model)
