"""The scheduler run against a cost table by the tool that developers use."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neoserve.models.families import parse_config
from neoserve.models.presets import PRESETS
from neoserve.scheduling.table import CostTable

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "simulate.py"
CHATS = ROOT.parent / "shared" / "workloads" / "azure_conv_2023.csv"


def simulate(*options: str) -> str:
    command = [sys.executable, str(TOOL), "llama-3.1-70b", "--device-kv-tokens", "8000", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def rates(said: str) -> tuple[float, float]:
    """Requests a second, device-only and with the host tier."""
    off, auto = map(float, re.findall(r"^(?:off|auto): ([\d.]+) requests/s", said, re.MULTILINE))
    return off, auto


def test_the_host_tier_pays_for_a_large_model_and_every_request_ends() -> None:
    said = simulate("--workload", "in=500,out=100,n=120")
    off, auto = rates(said)
    assert auto > 1.1 * off > 0
    assert "pipelined prefill" in said


@pytest.mark.skipif(not CHATS.exists(), reason=f"needs {CHATS}")
def test_workers_that_are_late_do_not_make_it_slower_than_without_the_host_tier(tmp_path: Path) -> None:
    """Each task of theirs takes 1.5 ms more than was measured at start, of few rows and of many. The few that are there
    at first show it, and must not make many seem as many times as dear."""
    shape = parse_config(PRESETS["llama-3.1-70b"], {}, "llama-3.1-70b").shape
    costs = CostTable.rough(shape, host_gb_s=150.0)
    tables = {"costs": costs, "truth": replace(costs, host_task_us=costs.host_task_us + 1500)}
    options = ["--device-kv-tokens", "20000", "--max-num-batched-tokens", "2048"]
    for name, table in tables.items():
        (tmp_path / name).write_text(table.to_json())
        options += [f"--{name}", str(tmp_path / name)]
    off, auto = rates(simulate("--workload", f"lengths={CHATS},cut=4000,limit=150", *options))
    assert auto >= off


def test_latency_is_the_same_until_the_device_pool_is_too_small_and_then_lower_with_the_host_tier() -> None:
    said = simulate("--workload", "in=500,out=100,n=120", "--rates", "0.5,8")
    (off, off_busy), (auto, auto_busy) = (
        map(float, re.findall(rf"^{mode} at .*: latency per token mean ([\d.]+)", said, re.MULTILINE))
        for mode in ("off", "auto")
    )
    assert auto == off
    assert auto_busy < 0.9 * off_busy
