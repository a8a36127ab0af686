"""`neo bench`: each module `cli.bench_NAME` holds one command, the function NAME, loaded when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import typer
from typer.core import TyperGroup

import neoserve.cli

_PREFIX = "bench_"


class BenchCommands(TyperGroup):
    """The benchmarks that are there."""

    def list_commands(self, ctx: Any) -> list[str]:
        modules = pkgutil.iter_modules(neoserve.cli.__path__)
        return sorted(module.name[len(_PREFIX) :] for module in modules if module.name.startswith(_PREFIX))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{neoserve.cli.__name__}.{_PREFIX}{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)
