"""Requests as curl and benchmark clients send them."""

from __future__ import annotations

import json

import httpx

import neoserve
from tests.server.running import RunningServer


def test_the_fields_of_vllm_bench(idle_server: RunningServer) -> None:
    body = {
        "model": "embedded",
        "prompt": "1, 2, 3, ",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 20,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{idle_server.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 20
    assert chunks[-1]["choices"] == []
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks[:-1])


def test_null_fields_are_fields_not_given(idle_server: RunningServer) -> None:
    nulls = [
        "n",
        "stop",
        "seed",
        "logit_bias",
        "stream",
        "stream_options",
        "top_p",
        "presence_penalty",
        "user",
        "best_of",
    ]
    body = {"prompt": "1, 2, ", "max_tokens": 4, **dict.fromkeys(nulls)}
    assert httpx.post(f"{idle_server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_an_unknown_field_is_ignored_and_warned_of_once(idle_server: RunningServer) -> None:
    body = {"prompt": "1, 2, ", "max_tokens": 2, "flavour_of_tea": "green"}
    for _ in range(2):
        assert httpx.post(f"{idle_server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert idle_server.log.count("flavour_of_tea") == 1


def test_prompt_logprobs_and_token_ids(idle_server: RunningServer) -> None:
    body = {"prompt": "1, 2, ", "max_tokens": 3, "prompt_logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    choice = httpx.post(f"{idle_server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert len(choice["token_ids"]) == 3
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token_id, position in zip(choice["prompt_token_ids"][1:], rest, strict=True):
        assert position[str(token_id)]["rank"] >= 1


def test_pages_about_the_server(idle_server: RunningServer) -> None:
    def page(path: str) -> httpx.Response:
        return httpx.get(idle_server.url + path).raise_for_status()

    assert page("/health").content == b""
    assert page("/ping").status_code == httpx.post(f"{idle_server.url}/ping").status_code == 200
    assert page("/version").json() == {"version": neoserve.__version__}
    load = page("/load").json()
    assert load["server_load"] == 0
    assert load["device_blocks"] == 256 // 16
    assert page("/openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/chat/completions"}


def test_both_tiers_decode_and_the_metrics_say_so(idle_server: RunningServer) -> None:
    before = idle_server.metrics()
    for num_prompts, max_tokens in ((12, 40), (1, 260)):  # the last is too long for the device pool
        prompts = [f"{number}, {number + 1}, " for number in range(num_prompts)]
        body = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{idle_server.url}/v1/completions", json=body, timeout=120).raise_for_status()
    after = idle_server.wait_until_idle()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    tiers = [grown[f'decoded_tokens_total{{tier="{tier}"}}'] for tier in ("device", "host")]
    assert min(tiers) > 0
    assert sum(tiers) == 12 * 39 + 259  # each choice's first token comes from its prompt
    assert grown["generation_tokens_total"] == 12 * 40 + 260
    assert grown['request_success_total{finished_reason="length"}'] == 13
    assert grown["time_to_first_token_seconds_count"] == 13
    assert grown["inter_token_latency_seconds_count"] == 12 * 39 + 259
    assert grown["iterations_total"] >= 40
    assert after["host_attention_gigabytes_per_second"] > 0
    assert after["last_iteration_measured_seconds"] > 0
