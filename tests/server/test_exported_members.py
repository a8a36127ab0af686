"""The public names, and that importing them is quick."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import neoserve

ROOT = Path(__file__).parents[2]


def test_exported_members() -> None:
    assert neoserve.__all__ == sorted(
        neoserve.__all__, key=lambda name: (not name.isupper(), name.startswith("_"), name)
    )
    for name in neoserve.__all__:
        member = getattr(neoserve, name)
        if name != "__version__":
            assert member.__name__ == name
            assert member.__doc__
    assert set(dir(neoserve)) >= set(neoserve.__all__)


def test_importing_neoserve_imports_no_torch() -> None:
    script = "import sys, neoserve; assert not {'torch', 'transformers', 'zmq', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == neoserve.__version__
