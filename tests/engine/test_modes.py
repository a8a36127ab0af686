"""Greedy tokens equal transformers', whatever the placement over the tiers and the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from neoserve.core.request import SamplingParams
from tests.engine.driving import MODES, check_greedy, engine, generate
from tests.families import FAMILIES, save_family

NUM_TOKENS = 64
PROMPTS = [[(7 * length + 3 * i) % 120 + 3 for i in range(length)] for length in (1, 5, 15, 16, 17, 40, 90)]


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, never stopping."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel, list[list[int]]]:
    directory = tmp_path_factory.mktemp(request.param)
    # The host tier's kernels serve head dimensions from 64.
    model = save_family(request.param, directory, head_dim=64, num_hidden_layers=3)
    return directory, model, [greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_transformers(family: tuple[Path, PreTrainedModel, list[list[int]]], mode: str) -> None:
    directory, model, expected = family
    with engine(str(directory), **MODES[mode]) as core:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        for prompt, tokens, others in zip(PROMPTS, generate(core, PROMPTS, params), expected, strict=True):
            check_greedy(model, prompt, tokens, others)
        stats = core.stats()
        assert (stats.host_tokens_total > 0) == (mode not in ("off", "auto-roomy"))
        assert (stats.device_tokens_total > 0) == (mode != "all")
