"""Keys, body sizes and the bounded queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.server.running import BOTH_TIERS, RunningServer

FLAGS = (*BOTH_TIERS, "--max-num-seqs", "2", "--max-waiting", "3", "--max-body-bytes", "20000", "--api-key", "first",
         "--api-key", "zweiter Schlüssel", "--served-model-name", "small", "--served-model-name", "alias")  # fmt: skip


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("limited") / "log", FLAGS) as running:
        yield running


def test_a_key_is_needed_for_the_model_and_not_for_health(limited: RunningServer) -> None:
    body = {"prompt": "1, ", "max_tokens": 1}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
    ):
        for path in ("/v1/completions", "/tokenize", "/v1/models/x"):
            response = httpx.post(limited.url + path, json=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{limited.url}/health").status_code == 200
    assert httpx.get(f"{limited.url}/metrics").status_code == 200


@pytest.mark.parametrize("key", ["first", "zweiter Schlüssel"])
def test_every_key_that_was_given_opens(limited: RunningServer, key: str) -> None:
    headers = {"Authorization": b"Bearer " + key.encode()}
    assert httpx.get(f"{limited.url}/v1/models", headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        limited.openai("wrong").models.list()


def test_a_model_may_have_several_names(limited: RunningServer) -> None:
    client = limited.openai("first")
    assert [model.id for model in client.models.list()] == ["small", "alias"]
    assert client.completions.create(model="alias", prompt="1, ", max_tokens=1).model == "alias"


def test_large_bodies_are_refused_with_and_without_a_declared_length(limited: RunningServer) -> None:
    body = json.dumps({"prompt": "1" * 30000}).encode()
    headers = {"Authorization": "Bearer first", "Content-Type": "application/json"}
    pieces = (body[at : at + 1000] for at in range(0, len(body), 1000))
    for content in (body, pieces):
        response = httpx.post(f"{limited.url}/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert "20000 bytes" in response.json()["error"]["message"]


async def test_a_full_queue_is_a_429_that_says_when_to_come_back(limited: RunningServer) -> None:
    body = {"prompt": "1, ", "max_tokens": 200, "ignore_eos": True}
    headers = {"Authorization": "Bearer first"}
    async with httpx.AsyncClient(base_url=limited.url, timeout=120, headers=headers) as client:
        responses = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(16)))
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
        many = {"prompt": ["1, "] * 20, "max_tokens": 4}  # all of a request or none of it
        assert (await client.post("/v1/completions", json=many)).status_code == 429
    limited.wait_until_idle()
