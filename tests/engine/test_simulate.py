"""The scheduler run against a cost table by the tool that developers use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "simulate.py"


def simulate(*options: str) -> str:
    command = [sys.executable, str(TOOL), "llama-3.1-70b", "--device-kv-tokens", "8000", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_host_tier_pays_for_a_large_model_and_every_request_ends() -> None:
    said = simulate("--workload", "in=500,out=100,n=120")
    off, auto = map(float, re.findall(r"^(?:off|auto): ([\d.]+) requests/s", said, re.MULTILINE))
    assert auto > 1.1 * off > 0
    assert "pipelined prefill" in said


def test_latency_is_the_same_until_the_device_pool_is_too_small_and_then_lower_with_the_host_tier() -> None:
    said = simulate("--workload", "in=500,out=100,n=120", "--rates", "0.5,8")
    (off, off_busy), (auto, auto_busy) = (
        map(float, re.findall(rf"^{mode} at .*: latency per token mean ([\d.]+)", said, re.MULTILINE))
        for mode in ("off", "auto")
    )
    assert auto == off
    assert auto_busy < 0.9 * off_busy
