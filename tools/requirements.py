"""Print what pyproject.toml requires, to build, to run and for the extras named as arguments, one on a line."""

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    project = pyproject["project"]
    chosen = [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]
    return [*pyproject["build-system"]["requires"], *project["dependencies"], *chosen]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
