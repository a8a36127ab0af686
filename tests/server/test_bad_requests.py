"""Every wrong request has its status, its field and a message that says what to do; the server lives on."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.server.running import RunningServer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"prompt": "1, 2, "}
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
CONTINUED: dict[str, Any] = {"continue_final_message": True}

BAD = [
    # path, body, status, param, pattern of the message
    (COMPLETIONS, {}, 400, "prompt", "prompt is missing"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", r"prompt is \[\]; expected a string"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", "prompt is 5; expected a string"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "expected a string, token ids, or a list"),
    (COMPLETIONS, {"prompt": [10**9]}, 400, "prompt", "token id 1000000000; expected 0 to"),
    (COMPLETIONS, {"prompt": [[1], [-1]]}, 400, "prompt", "token id -1"),
    (COMPLETIONS, {"prompt": "7" * 600}, 400, "prompt", "context is 512"),
    (COMPLETIONS, {"prompt": ["1"] * 2000}, 400, "prompt", "2000 choices"),
    (COMPLETIONS, PROMPT | {"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0; expected at least 1"),
    (COMPLETIONS, PROMPT | {"max_tokens": -1}, 400, "max_tokens", "at least 1"),
    (COMPLETIONS, PROMPT | {"max_tokens": 10**30}, 400, "max_tokens", "are left"),
    (COMPLETIONS, PROMPT | {"max_tokens": "many"}, 400, "max_tokens", "valid integer"),
    (COMPLETIONS, PROMPT | {"max_tokens": 1.5}, 400, "max_tokens", "valid integer"),
    (COMPLETIONS, PROMPT | {"temperature": -1}, 400, "temperature", "expected 0 or more"),
    (COMPLETIONS, PROMPT | {"temperature": "hot"}, 400, "temperature", "valid number"),
    (COMPLETIONS, PROMPT | {"temperature": True}, 400, "temperature", "valid number"),
    (COMPLETIONS, PROMPT | {"top_p": 0}, 400, "top_p", "more than 0, at most 1"),
    (COMPLETIONS, PROMPT | {"top_k": -2}, 400, "top_k", "-1 or 0"),
    (COMPLETIONS, PROMPT | {"top_k": 10**20}, 400, "top_k", "less than"),
    (COMPLETIONS, PROMPT | {"min_p": 2}, 400, "min_p", "0 to 1"),
    (COMPLETIONS, PROMPT | {"repetition_penalty": 0}, 400, "repetition_penalty", "more than 0"),
    (COMPLETIONS, PROMPT | {"presence_penalty": 3}, 400, "presence_penalty", "-2 to 2"),
    (COMPLETIONS, PROMPT | {"frequency_penalty": -3}, 400, "frequency_penalty", "-2 to 2"),
    (COMPLETIONS, PROMPT | {"seed": -1}, 400, "seed", "0 or more"),
    (COMPLETIONS, PROMPT | {"seed": 2**70}, 400, "seed", "less than"),
    (COMPLETIONS, PROMPT | {"n": 0}, 400, "n", "1 to 128"),
    (COMPLETIONS, PROMPT | {"n": 129}, 400, "n", "1 to 128"),
    (COMPLETIONS, PROMPT | {"best_of": 3}, 400, "best_of", "not supported"),
    (COMPLETIONS, PROMPT | {"suffix": "x"}, 400, "suffix", "not supported"),
    (COMPLETIONS, PROMPT | {"logprobs": 21}, 400, "logprobs", "0 to 20"),
    (COMPLETIONS, PROMPT | {"logprobs": True}, 400, "logprobs", "valid integer"),
    (COMPLETIONS, PROMPT | {"prompt_logprobs": 99}, 400, "prompt_logprobs", "0 to 20"),
    (COMPLETIONS, PROMPT | {"stop": 5}, 400, "stop", "expected a string or up to 16"),
    (COMPLETIONS, PROMPT | {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (COMPLETIONS, PROMPT | {"stop": ["x", ""]}, 400, "stop", "not empty"),
    (COMPLETIONS, PROMPT | {"stop_token_ids": [999999]}, 400, "stop_token_ids", "token id 999999"),
    (COMPLETIONS, PROMPT | {"min_tokens": 9, "max_tokens": 4}, 400, "min_tokens", "at most max_tokens"),
    (COMPLETIONS, PROMPT | {"logit_bias": {"word": 1}}, 400, "logit_bias", "key 'word'; expected token ids"),
    (COMPLETIONS, PROMPT | {"logit_bias": {"99999": 1}}, 400, "logit_bias", "token id 99999"),
    (COMPLETIONS, PROMPT | {"logit_bias": {"5": 101}}, 400, "logit_bias", "-100 to 100"),
    (COMPLETIONS, PROMPT | {"logit_bias": {str(key): 1 for key in range(2000)}}, 400, "logit_bias", "at most 1024"),
    (COMPLETIONS, PROMPT | {"stream": "yes"}, 400, "stream", "valid boolean"),
    (COMPLETIONS, PROMPT | {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream is true"),
    (COMPLETIONS, PROMPT | {"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here; expected 'embedded'"),
    (CHAT, {}, 400, "messages", "messages is missing"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, 400, "messages", "valid list"),
    (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages", "messages.0.role is missing"),
    (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages", "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text"),
    (CHAT, HI | {"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, HI | {"logprobs": True, "top_logprobs": 30}, 400, "top_logprobs", "0 to 20"),
    (CHAT, HI | {"logprobs": 3}, 400, "logprobs", "valid boolean"),
    (CHAT, HI | {"max_completion_tokens": 10**6}, 400, "max_tokens", "context of 512"),
    (CHAT, HI | {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    (CHAT, HI | {"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    (CHAT, HI | CONTINUED | {"add_generation_prompt": True}, 400, "continue_final_message", "exclude"),
    ("/tokenize", {}, 400, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": "a", "messages": HI["messages"]}, 400, "prompt", "either prompt or messages"),
    ("/detokenize", {"tokens": [10**7]}, 400, "tokens", "token id 10000000"),
    ("/detokenize", {"tokens": "abc"}, 400, "tokens", "valid list"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "pattern"), BAD)
def test_wrong_requests(
    server: RunningServer, path: str, body: dict[str, Any], status: int, param: str, pattern: str
) -> None:
    response = httpx.post(server.url + path, json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert re.search(pattern, error["message"])
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [(b"{not json", "not JSON"), (b"[]", "not a request"), (b"", ".")],
    ids=["text", "list", "empty"],
)
def test_bodies_that_are_no_requests(server: RunningServer, content: bytes, pattern: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400
    assert re.search(pattern, response.json()["error"]["message"])


def test_not_a_number_is_refused(server: RunningServer) -> None:
    for value in ("NaN", "Infinity"):
        body = f'{{"prompt": "1", "temperature": {value}}}'
        response = httpx.post(server.url + COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_unknown_paths_and_methods(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/v2/anything").status_code == 404
    response = httpx.get(server.url + COMPLETIONS)
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_server_is_idle_after_all_of_them(idle_server: RunningServer) -> None:
    assert idle_server.process.poll() is None
