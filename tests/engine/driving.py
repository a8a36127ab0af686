"""Drive an `EngineCore` to the end of some requests, checking its integrity."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from neoserve.core.config import DType, EngineConfig
from neoserve.core.request import Request, SamplingParams, TokenEvent
from neoserve.engine.core import EngineCore
from tests.families import reference_logits, rounded_logits

DEVICE = os.environ.get("NEO_TEST_DEVICE", "reference")
"""Where the engine tests run: "reference", in float32, or "cuda", in bfloat16 or what that GPU has instead."""
ON_GPU = DEVICE == "cuda"
DTYPE: DType = "float32"
if ON_GPU:
    from neoserve.device.cuda import usable_dtype

    DTYPE = usable_dtype("bfloat16")
ROUNDING = 6.0
"""How far below the likeliest token a greedy one may be where the engine rounds to bfloat16: in root mean square errors
of transformers' logits in bfloat16. Its own greedy tokens are up to 5.5 below, random ones 20 to 100."""

MODES: dict[str, dict[str, Any]] = {
    "off": {"offload": "off", "device_kv_tokens": 2048},
    "all": {"offload": "all", "host_memory_bytes": 64 * 2**20},
    "auto-roomy": {"offload": "auto", "device_kv_tokens": 2048, "host_memory_bytes": 64 * 2**20},
    "auto-tight": {"offload": "auto", "device_kv_tokens": 144, "host_memory_bytes": 64 * 2**20},
    "auto-chunked": {
        "offload": "auto",
        "device_kv_tokens": 144,
        "host_memory_bytes": 64 * 2**20,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
    },
}
"""Ways to place sequences over the tiers; all must give the same greedy tokens, where nothing is rounded. The pools of
144 tokens on the device are too small for a sequence of 145: that one runs on the host, whether it pays or not."""


@contextmanager
def engine(model: str | None, **settings: Any) -> Iterator[EngineCore]:
    """An engine on `DEVICE`, closed and checked at the end."""
    defaults: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE, "max_num_seqs": 32}
    core = EngineCore(EngineConfig(model=model, **{**defaults, **settings}))
    try:
        yield core
        core.check_integrity()
        stats = core.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.device_blocks_used == stats.host_blocks_used == 0
    finally:
        core.close()


def request(core: EngineCore, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Request:
    """A request as the front end would make it."""
    eos_ids = () if params.ignore_eos else core.info.eos_ids
    return Request(request_id, tuple(prompt), params, (*eos_ids, *params.stop_token_ids), arrival_s=0.0)


def finish(core: EngineCore) -> dict[str, list[TokenEvent]]:
    """Step until nothing is left; the events of each request."""
    events: dict[str, list[TokenEvent]] = {}
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def generate(core: EngineCore, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """The tokens of each prompt, all submitted at once."""
    for index, prompt in enumerate(prompts):
        core.add(request(core, str(index), prompt, params))
    events = finish(core)
    for index in range(len(prompts)):
        assert events[str(index)][-1].finish_reason in ("stop", "length"), events[str(index)][-1]
    return [[token for event in events[str(index)] for token in event.token_ids] for index in range(len(prompts))]


def check_greedy(model: PreTrainedModel, prompt: Sequence[int], found: Sequence[int], expected: Sequence[int]) -> None:
    """Assert that `found` is a greedy continuation: `expected` itself in float32, else one whose every token is, after
    those before it, within `ROUNDING` of the likeliest by transformers' float32 model."""
    if not ON_GPU:
        assert list(found) == list(expected)
        return
    assert len(found) == len(expected)
    ids, rows = [*prompt, *found], slice(len(prompt) - 1, -1)
    exact_TV, rounded_TV = reference_logits(model, ids)[rows], rounded_logits(model, ids)[rows]
    chosen_T = exact_TV.gather(1, torch.tensor(list(found)).unsqueeze(1)).squeeze(1)
    below_T = (exact_TV.amax(-1) - chosen_T) / (rounded_TV - exact_TV).square().mean().sqrt()
    assert below_T.max() < ROUNDING, f"token {int(below_T.argmax())} is {float(below_T.max()):.2f} below the likeliest"
