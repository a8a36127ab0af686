"""Costs are measured once for the same model, machine and code."""

from __future__ import annotations

from pathlib import Path

import pytest

import neoserve
from neoserve import _native
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
