"""A real `neo serve` on the embedded checkpoint, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import psutil

START_S = 120.0
# Small pools, so that a handful of requests uses both tiers and both sub-batches.
BOTH_TIERS = ("--device", "reference", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32",
              "--offload", "auto", "--device-kv-tokens", "256", "--host-memory", "8MiB")  # fmt: skip


def neo(*arguments: str, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "neoserve.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, input=stdin, env={**os.environ, **(env or {})}
    )


class RunningServer:
    """The server's process; leaving the context kills it."""

    def __init__(self, log: Path, flags: Sequence[str] = BOTH_TIERS, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "neoserve.cli.main", "serve", "--port", "0", *flags],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        self.url = self._wait_until_serving()

    @property
    def log(self) -> str:
        """What the server has printed."""
        return self._log.read_text()

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        """The official client, without its own retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def async_openai(self) -> openai.AsyncOpenAI:
        """The official asynchronous client, without its own retries."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        """`/metrics` without the label of the model: name{labels} to value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        values = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r',?model_name="[^"]*",?', "", name).removesuffix("{}")
                values[name.removeprefix("neo:")] = float(value)
        return values

    def wait_until_idle(self, timeout_s: float = 60.0) -> dict[str, float]:
        """The metrics once nothing runs, waits or holds a block."""
        deadline = time.monotonic() + timeout_s
        busy = ('kv_blocks_used{tier="device"}', 'kv_blocks_used{tier="host"}')
        while time.monotonic() < deadline:
            metrics = self.metrics()
            if not any(metrics[name] for name in ("num_requests_running", "num_requests_waiting", *busy)):
                return metrics
            time.sleep(0.05)
        raise AssertionError(f"the server is not idle after {timeout_s} s: {metrics}")

    def engine_process(self) -> psutil.Process:
        """The engine's own process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "neoserve.engine.process" in " ".join(child.cmdline()))

    def _wait_until_serving(self) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = re.search(r"on (http://\S+)", self.log)
            if found and _answers(found[1]):
                return found[1]
            if self.process.poll() is not None:
                raise AssertionError(f"neo serve ended with {self.process.returncode}:\n{self.log}")
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"neo serve did not start within {START_S} s:\n{self.log}")

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
