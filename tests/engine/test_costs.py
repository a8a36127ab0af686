"""Costs are measured once for the same model, machine and code."""

from __future__ import annotations

from pathlib import Path

import pytest

import neoserve
from neoserve import _native
from neoserve.engine import calibrate
from neoserve.scheduling.cost import CostTable
from tests.engine.conftest import Tiny
from tests.engine.driving import engine


def test_costs_are_measured_anew_when_the_code_has_changed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("NEO_CACHE_DIR", str(cache))

    def measured() -> dict[Path, int]:
        """The tables in the cache after a start, and when each was written."""
        with engine(tiny.path, offload="off", device_kv_tokens=64, max_num_batched_tokens=32):
            return {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    first = measured()
    assert len(first) == 1
    assert measured() == first

    rebuilt = tmp_path / "native"
    rebuilt.write_bytes(Path(_native.__file__).read_bytes() + b"!")
    monkeypatch.setattr(_native, "__file__", str(rebuilt))
    second = measured()
    assert len(second) == 2

    monkeypatch.setattr(neoserve, "__version__", f"{neoserve.__version__}.post1")
    third = measured()
    assert len(third) == 3
    assert {path: third[path] for path in first} == first


def test_a_worker_that_is_late_for_a_while_does_not_make_host_rows_dear(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    attend_us = calibrate.Calibration._host_us
    late_us = 1e6
    seen: list[tuple[int, int]] = []

    def late_at_first(self: calibrate.Calibration, num_rows: int, length: int) -> float:
        """The first measurements meet a worker that somebody else keeps from its core."""
        seen.append((num_rows, length))
        return attend_us(self, num_rows, length) + late_us * (len(seen) <= calibrate.REPEATS)

    monkeypatch.setattr(calibrate.Calibration, "_host_us", late_at_first)
    with engine(tiny.path, offload="all", host_memory_bytes=2**20, max_num_batched_tokens=32):
        pass
    [path] = tmp_path.glob("costs-*.json")
    table = CostTable.from_json(path.read_text())
    assert len(set(seen)) == 3
    assert max(table.host_task_us, table.host_us_per_row, table.host_us_per_token) < late_us / 100
