"""The scheduler run against a cost table by the tool that developers use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "simulate.py"


def test_the_host_tier_pays_for_a_large_model_and_every_request_ends() -> None:
    command = [sys.executable, str(TOOL), "llama-3.1-70b", "--workload", "in=500,out=100,n=120"]
    command += ["--device-kv-tokens", "8000"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    off, auto = map(float, re.findall(r"^(?:off|auto): ([\d.]+) requests/s", said, re.MULTILINE))
    assert auto > 1.1 * off > 0
    assert "pipelined prefill" in said
