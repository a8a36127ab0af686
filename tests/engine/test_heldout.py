"""The embedded checkpoint as an oracle: right answers to prompts that it never saw, wherever the KV lives."""

from __future__ import annotations

import pytest

from neoserve.core.request import SamplingParams
from neoserve.engine.llm import LLM
from tests.engine.driving import DEVICE, MODES, ON_GPU
from tests.heldout import held_out_prompts

DTYPES = ["bfloat16"] if ON_GPU else ["float32", "bfloat16"]
MOST_WRONG = {"float32": 0, "bfloat16": 0 if ON_GPU else 2}
"""Of 500. A CPU's matrix products in bfloat16 round as its instruction set has it."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["off", "all", "auto-tight"])
def test_held_out_prompts_are_answered_exactly(mode: str, dtype: str) -> None:
    prompts = held_out_prompts()
    assert len(prompts) == 500
    settings = {**MODES[mode], "max_model_len": 256, "host_memory_bytes": 2**28}
    with LLM(device=DEVICE, dtype=dtype, max_num_seqs=64, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=80)
        outputs = llm.chat([list(prompt.messages) for prompt in prompts], params)
        stats = llm.stats()
    replies = [output.outputs[0].text for output in outputs]
    wrong = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply != prompt.answer]
    assert len(wrong) <= MOST_WRONG[dtype], wrong
    assert (stats.device_tokens_total > 0) == (mode != "all")
    if mode == "all" or (mode == "auto-tight" and not ON_GPU):  # a GPU is done before the CPUs have begun
        assert stats.host_tokens_total > 0
    if mode == "auto-tight" and not ON_GPU:
        assert stats.pipelined_iterations_total > 0
