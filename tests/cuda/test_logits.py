"""The engine's log-probabilities in bfloat16 against transformers' on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neoserve.core.request import SamplingParams
from tests.engine.driving import engine, finish, request
from tests.families import reference_logits, rounded_logits, save_family

PROMPT = [(11 * i) % 120 + 3 for i in range(200)]
MARGIN = 1.5
"""By how much our error may exceed that of transformers in bfloat16, both against its float32 model."""


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3-tied"])
def test_log_probabilities_are_as_exact_as_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path, head_dim=64, num_hidden_layers=4, max_position_embeddings=512)
    with engine(str(tmp_path), device="cuda", dtype="bfloat16", offload="off", device_kv_tokens=512) as core:
        core.add(request(core, "a", PROMPT, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)))
        positions = [position for event in finish(core)["a"] for position in event.prompt_logprobs]
    ours = torch.tensor([position.logprob for position in positions])
    places = (list(range(len(PROMPT) - 1)), PROMPT[1:])
    exact, theirs = (logits(model, PROMPT).log_softmax(-1)[places] for logits in (reference_logits, rounded_logits))
    assert (ours - exact).norm() < MARGIN * (theirs - exact).norm()
