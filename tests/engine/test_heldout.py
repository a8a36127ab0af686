"""The embedded checkpoint through the whole engine: every held-out prompt is answered as it was on the CPU."""

from __future__ import annotations

import pytest

from neoserve.core.request import SamplingParams
from neoserve.engine.llm import LLM
from tests.engine.driving import DEVICE, DTYPE, MODES, ON_GPU
from tests.heldout import held_out_prompts

NUM_PROMPTS = None if ON_GPU else 50
"""All 500 take minutes on a CPU."""


@pytest.mark.parametrize("mode", ["off", "all", "auto-tight"])
def test_held_out_prompts_are_answered_exactly(mode: str) -> None:
    prompts = held_out_prompts(NUM_PROMPTS)
    settings = {**MODES[mode], "max_model_len": 256, "host_memory_bytes": 2**28}
    with LLM(device=DEVICE, dtype=DTYPE, max_num_seqs=64, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=80)
        outputs = llm.chat([list(prompt.messages) for prompt in prompts], params)
    replies = [output.outputs[0].text for output in outputs]
    assert replies == [prompt.answer for prompt in prompts]
