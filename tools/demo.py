"""`make demo`: start `neo serve` on the embedded checkpoint, ask it something through the `openai` client, stop it.

The device pool is made so small that the host tier has to help, as it would with a large model on a full GPU.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import AsyncOpenAI

FLAGS = ("--device-kv-tokens", "256", "--host-memory", "32MiB", "--max-model-len", "512", "--port", "0",
         "--disable-uvicorn-access-log")  # fmt: skip
START_S = 120.0
QUESTIONS = (
    "Who are you?", "What is 17 + 25?", "Spell the word window.", "Count from 5 to 16.",
    "Sort these numbers: 41, 7, 88, 19.", "Copy the word lantern.", "What is 64 + 29?", "Count from 61 to 70.",
    "Spell the word garden.", "Sort 9 3 7 1 in descending order.", "What do 38 and 47 make?", "Count from 1 to 13.",
    "Please repeat: orange monkey", "How do I spell banana?", "What is 90 + 8?", "Count from 90 to 98.",
)  # fmt: skip


@contextmanager
def serving() -> Iterator[str]:
    """A running server's address; what the server says while it starts is shown."""
    with tempfile.TemporaryDirectory(prefix="neo-demo-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "neoserve.cli.main", "serve", *FLAGS]
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            print(f"$ neo serve {' '.join(FLAGS)}", flush=True)
            yield wait_until_serving(process, log)
        finally:
            process.terminate()
            process.wait()


def wait_until_serving(process: subprocess.Popen[bytes], log: Path) -> str:
    """Show the log as it grows until the server answers; ends the demo with the log when it does not."""
    shown, deadline = 0, time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        lines = log.read_text().splitlines(keepends=True)
        for line in lines[shown:]:
            if line.endswith("\n"):
                print("  " + line, end="", flush=True)
                shown += 1
        found = re.search(r"on (http://\S+)\n", "".join(lines[:shown]))
        if found and is_healthy(found[1]):
            return found[1]
        time.sleep(0.05)
    sys.exit(f"the server did not start:\n{log.read_text()}")


def is_healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


async def ask(client: AsyncOpenAI, question: str, *, show: bool) -> tuple[str, int]:
    """The streamed answer and how many tokens it has; shown as it comes if wanted."""
    text, num_tokens = "", 0
    stream = await client.chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if show:
                print(choice.delta.content or "", end="", flush=True)
    return text, num_tokens


async def converse(url: str) -> None:
    """Ask everything at once, then say how fast it was and who decoded what."""
    print(
        f"\n{len(QUESTIONS)} questions at once through the openai client:\n\n  {QUESTIONS[0]}\n    ", end="", flush=True
    )
    start_s = time.monotonic()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(ask(client, question, show=index == 0) for index, question in enumerate(QUESTIONS))
        )
    elapsed_s = time.monotonic() - start_s
    print()
    for question, (text, _) in list(zip(QUESTIONS, answers, strict=True))[1:]:
        print(f"  {question:36} {text}")
    num_tokens = sum(tokens for _, tokens in answers)
    print(f"\n{num_tokens} tokens in {elapsed_s:.1f} s: {num_tokens / elapsed_s:.0f} tokens/s")
    print(f"decoded by the device tier: {decoded(url, 'device')} tokens")
    print(f"decoded by the host tier:   {decoded(url, 'host')} tokens, attended to by the C++ worker pool")


def decoded(url: str, tier: str) -> int:
    """Tokens that a tier has decoded, from /metrics."""
    page = httpx.get(f"{url}/metrics").text
    found = re.search(rf'^neo:decoded_tokens_total{{.*tier="{tier}".*}} (\S+)$', page, re.MULTILINE)
    return int(float(found[1])) if found else 0


def main() -> None:
    """Run the demo."""
    with serving() as url:
        asyncio.run(converse(url))


if __name__ == "__main__":
    main()
