"""What a single request may ask for, through the engine: limits, ends, seeds and log-probabilities."""

from __future__ import annotations

import pytest
import torch

from neoserve.core.errors import ConfigError, QueueFullError, RequestTooLongError
from neoserve.core.plan import TokenLogprobs
from neoserve.core.request import SamplingParams
from tests.engine.conftest import Tiny
from tests.engine.driving import MODES, ON_GPU, check_greedy, engine, finish, generate, request
from tests.families import reference_logits, rounded_logits

PROMPT = [5, 9, 17, 4, 77, 21, 8]
ROUNDING_MARGIN = 1.5
"""By how much our error in bfloat16 may exceed that of transformers in bfloat16, both against its float32 model."""


def test_a_prompt_longer_than_the_device_pool_is_served_from_the_host(tiny: Tiny) -> None:
    prompt = [(11 * i) % 120 + 3 for i in range(300)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with engine(tiny.path, **MODES["off"]) as core:
        [expected] = generate(core, [prompt], params)
    with engine(tiny.path, **MODES["auto-chunked"]) as core:
        [found] = generate(core, [prompt], params)
        check_greedy(tiny.model, prompt, found, expected)
        assert core.stats().host_tokens_total > 0


def test_a_request_that_fits_nowhere_is_refused_at_once(tiny: Tiny) -> None:
    with engine(tiny.path, offload="off", device_kv_tokens=64) as core:
        params = SamplingParams(max_tokens=40)
        with pytest.raises(RequestTooLongError, match="64"):
            core.add(request(core, "long", list(range(3, 80)), params))
        assert not core.has_work


def test_a_full_queue_refuses(tiny: Tiny) -> None:
    with engine(tiny.path, offload="off", device_kv_tokens=64, max_waiting=2) as core:
        params = SamplingParams(temperature=0, max_tokens=2)
        for index in range(2):
            core.add(request(core, str(index), PROMPT, params))
        with pytest.raises(QueueFullError, match="2"):
            core.add(request(core, "2", PROMPT, params))
        finish(core)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "off", "device_kv_tokens": 64, "max_model_len": 256}, "--max-model-len"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "--max-num-batched-tokens"),
        ({"host_threads": 4096}, "--host-threads"),
        ({"host_memory_bytes": 10}, "--host-memory"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny: Tiny, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message), engine(tiny.path, **settings):
        pass


def test_stop_ids_and_min_tokens(tiny: Tiny) -> None:
    with engine(tiny.path, **MODES["auto-roomy"]) as core:
        [tokens] = generate(core, [PROMPT], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        stop = tokens[6]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(stop,))
        [stopped] = generate(core, [PROMPT], params)
        assert stopped == tokens[: tokens.index(stop) + 1]
        params = SamplingParams(
            temperature=0, max_tokens=24, min_tokens=20, ignore_eos=True, stop_token_ids=tuple(set(tokens))
        )
        [forced] = generate(core, [PROMPT], params)
        assert len(forced) >= 20
        assert not set(forced[:20]) & set(tokens)


@pytest.mark.skipif(ON_GPU, reason="a GPU's matrix products round differently for other numbers of rows")
@pytest.mark.parametrize("mode", ["off", "all", "auto-tight"])
def test_a_seed_gives_the_same_tokens_whatever_else_runs(tiny: Tiny, mode: str) -> None:
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=1234, max_tokens=32, ignore_eos=True)
    others = [[i + 3, 50, 60 + i] for i in range(9)]
    with engine(tiny.path, **MODES[mode]) as core:
        [alone] = generate(core, [PROMPT], params)
        for index, other in enumerate(others):
            core.add(request(core, f"other-{index}", other, SamplingParams(max_tokens=40, ignore_eos=True)))
        [in_company] = generate(core, [PROMPT], params)
        assert in_company == alone
        [another] = generate(core, [PROMPT], SamplingParams(temperature=0.9, seed=99, max_tokens=32, ignore_eos=True))
        assert another != alone


@pytest.mark.parametrize("mode", ["off", "all", "auto-chunked"])
def test_logprobs_equal_transformers(tiny: Tiny, mode: str) -> None:
    prompt = [(11 * i) % 120 + 3 for i in range(60)]
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    with engine(tiny.path, **MODES[mode]) as core:
        core.add(request(core, "a", prompt, params))
        core.add(request(core, "plain", PROMPT, SamplingParams(temperature=0, max_tokens=5)))
        events = finish(core)["a"]
    ids = prompt + [token for event in events for token in event.token_ids]
    exact_TV = reference_logits(tiny.model, ids).log_softmax(-1)
    found = [item for event in events for item in (*event.prompt_logprobs, *event.logprobs)]
    assert len(found) == len(ids) - 1
    for position, item in enumerate(found):
        check_ids(item, exact_TV[position], ids[position + 1], 2 if position < len(prompt) - 1 else 3)
    pairs = [(item.token_id, item.logprob) for item in found] + [pair for item in found for pair in item.top]
    rows = list(range(len(found))) + [row for row, item in enumerate(found) for _ in item.top]
    tokens, values = zip(*pairs, strict=True)
    errors = torch.tensor(values) - exact_TV[rows, tokens]
    if ON_GPU:
        rounded_TV = rounded_logits(tiny.model, ids).log_softmax(-1)
        assert errors.norm() < ROUNDING_MARGIN * (rounded_TV - exact_TV)[rows, tokens].norm()
    else:
        assert errors.abs().max() < 1e-3


def check_ids(item: TokenLogprobs, exact_V: torch.Tensor, token_id: int, num_top: int) -> None:
    """One position's tokens and their order, which rounding may change."""
    assert item.token_id == token_id
    assert len(item.top) == num_top
    if not ON_GPU:
        assert item.rank == int((exact_V > exact_V[token_id]).sum()) + 1
        assert [token for token, _ in item.top] == exact_V.topk(num_top).indices.tolist()
