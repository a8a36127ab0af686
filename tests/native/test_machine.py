"""Which instruction set and which CPUs are chosen."""

import os
import subprocess
import sys

import pytest

from neoserve import _native


def choice_with(instruction_set: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from neoserve import _native; print(_native.default_instruction_set())"],
        env={**os.environ, "NEO_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )


def test_portable_runs_everywhere_and_is_the_last_resort() -> None:
    assert _native.instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_the_override_is_taken(instruction_set: str) -> None:
    assert choice_with(instruction_set).stdout.strip() == instruction_set


def test_an_empty_override_is_none() -> None:
    assert choice_with("").stdout.strip() == _native.instruction_sets()[0]


def test_an_override_that_cannot_run_is_refused_by_name() -> None:
    failed = choice_with("sse9")
    assert failed.returncode != 0
    assert "ValueError" in failed.stderr
    assert "sse9" in failed.stderr
    assert "portable" in failed.stderr


def test_allowed_cpus_respect_affinity() -> None:
    everything = os.sched_getaffinity(0)
    assert set(_native.allowed_cpus()) <= everything
    one = max(everything)
    try:
        os.sched_setaffinity(0, {one})
        assert _native.allowed_cpus() == [one]
    finally:
        os.sched_setaffinity(0, everything)
