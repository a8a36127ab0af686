"""What the engine takes of the GPU's memory stays within what it may use."""

from __future__ import annotations

import pytest
import torch

from neoserve.core.errors import ConfigError
from neoserve.core.request import SamplingParams
from tests.engine.driving import engine, generate

ROOM_BYTES = 2**30
PROMPTS = [[(7 * length + 3 * i) % 120 + 3 for i in range(length)] for length in range(1, 700, 20)]
EVERYTHING = SamplingParams(
    temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
    logprobs=20, prompt_logprobs=20, logit_bias={5: 2.0}, max_tokens=20, ignore_eos=True,
)  # fmt: skip


def utilization_with(room_bytes: int) -> float:
    """The part of the GPU that is in use now, and so much more."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return (total_bytes - free_bytes + room_bytes) / total_bytes


@pytest.mark.parametrize("offload", ["off", "auto"])
def test_requests_that_ask_for_everything_stay_within_the_limit(offload: str) -> None:
    utilization = utilization_with(ROOM_BYTES)
    settings = {"device": "cuda", "dtype": "bfloat16", "host_memory_bytes": 2**27, "max_num_batched_tokens": 1024}
    with engine(None, **settings, offload=offload, gpu_memory_utilization=utilization) as core:
        assert core.info.config.device_blocks > 0
        assert all(len(tokens) == 20 for tokens in generate(core, PROMPTS, EVERYTHING))
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        assert total_bytes - free_bytes <= utilization * total_bytes


def test_a_pool_that_does_not_fit_is_refused() -> None:
    refused = pytest.raises(ConfigError, match="--device-kv-tokens")
    settings = {"device": "cuda", "dtype": "bfloat16", "offload": "off", "max_num_seqs": 2}
    with refused, engine(None, **settings, device_kv_tokens=2**28, gpu_memory_utilization=utilization_with(ROOM_BYTES)):
        pass
