"""Memory of both tiers: what is free, and what happens when the system refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from neoserve.core.errors import ConfigError, HostMemoryError
from neoserve.core.request import SamplingParams
from neoserve.engine.memory import free_host_bytes
from tests.engine.conftest import Tiny
from tests.engine.driving import ON_GPU, engine, generate
from tests.families import save_family

FAR_TOO_MUCH = 2**55


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "5000000", "memory.current": "2000000"}, 3_000_000),
        ({"memory/memory.limit_in_bytes": "4096", "memory/memory.usage_in_bytes": "8192"}, 0),
    ],
)
def test_the_control_group_limits_what_is_free(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert free_host_bytes(tmp_path) == expected


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "1"}])
def test_without_a_limit_all_that_is_available_is_free(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert free_host_bytes(tmp_path) > 2**20


def test_auto_runs_without_a_host_tier_when_its_memory_is_refused(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with engine(tiny.path, offload="auto", device_kv_tokens=256, host_memory_bytes=FAR_TOO_MUCH) as core:
        assert core.worker_pool is None
        assert core.info.config.host_blocks == 0
        [tokens] = generate(core, [[5, 9, 17]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert len(tokens) == 4
    assert "without a host tier" in caplog.text


def test_all_refuses_to_start_when_its_memory_is_refused(tiny: Tiny) -> None:
    refused = pytest.raises(HostMemoryError, match="--host-memory")
    with refused, engine(tiny.path, offload="all", host_memory_bytes=FAR_TOO_MUCH):
        pass


@pytest.mark.skipif(ON_GPU, reason="a GPU has fewer head dimensions than the host tier")
def test_a_head_dimension_that_the_host_tier_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_family("llama-head-dim", tmp_path, head_dim=32)
    with engine(str(tmp_path), offload="auto", device_kv_tokens=256) as core:
        assert core.info.config.host_blocks == 0
        [tokens] = generate(core, [[5, 9, 17]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert len(tokens) == 4
    assert "head dimensions" in caplog.text
    with pytest.raises(ConfigError, match="--offload off"), engine(str(tmp_path), offload="all"):
        pass
