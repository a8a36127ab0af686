"""Many clients at once, some of whom go away."""

from __future__ import annotations

import asyncio
import random
import time

import httpx

from tests.server.running import RunningServer

NUM_CLIENTS = 200


async def one_client(client: httpx.AsyncClient, number: int) -> str:
    """Ask for something; every third client hangs up, at a random moment, in one of three ways."""
    chance = random.Random(number)
    body = {
        "messages": [{"role": "user", "content": f"Count from {number % 7} to {number % 7 + 8}."}],
        "max_tokens": chance.randint(5, 60),
        "temperature": 0,
        "ignore_eos": True,
        "stream": number % 2 == 0,
        "n": 1 + (number % 20 == 0),
    }
    leaves = number % 3 == 0
    try:
        async with asyncio.timeout(chance.uniform(0.0, 3.0) if leaves else 200):
            if not body["stream"]:
                response = await client.post("/v1/chat/completions", json=body)
                return "done" if response.status_code == 200 else response.text
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = [line async for line in response.aiter_lines()]
                return "done" if lines[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in lines else repr(lines[-3:])
    except TimeoutError:
        return "left"


async def test_200_clients_of_whom_some_hang_up(idle_server: RunningServer) -> None:
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=idle_server.url, timeout=200, limits=limits) as client:
        results = await asyncio.gather(*(one_client(client, number) for number in range(NUM_CLIENTS)))
    stayed = [result for number, result in enumerate(results) if number % 3]
    assert set(stayed) == {"done"}
    assert "left" in results
    metrics = idle_server.wait_until_idle()
    assert metrics['request_success_total{finished_reason="abort"}'] > 0


def test_a_disconnect_ends_the_generation_at_once(idle_server: RunningServer) -> None:
    before = idle_server.wait_until_idle()["iterations_total"]
    body = {"prompt": "1, ", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{idle_server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    assert idle_server.wait_until_idle()["iterations_total"] - before < 300


def test_an_idle_server_sleeps(idle_server: RunningServer) -> None:
    idle_server.wait_until_idle()
    time.sleep(1.0)  # workers stop spinning
    engine = idle_server.engine_process()
    before = engine.cpu_times()
    time.sleep(2.0)
    after = engine.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1
