"""Flags that the load benchmarks share, one for each field of `LoadOptions`, defined once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from neoserve.cli.load.workload import WorkloadSpec
from neoserve.cli.options import engine_options
from neoserve.core.errors import ConfigError

_LOAD: dict[str, Any] = {"rich_help_panel": "Workload"}
_RUN: dict[str, Any] = {"rich_help_panel": "Run", "show_default": False}


@dataclass(frozen=True)
class LoadOptions:
    """What to run, and where the figures go."""

    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="A workload such as in=1000,out=100,n=60 or lengths=FILE,limit=80,cut=4000, what it leaves out as the "
            "flags below say; may be given several times, the model is loaded once.",
            **_LOAD,
        ),
    ] = None
    num_prompts: Annotated[int, typer.Option(help="Requests of a synthetic workload.", **_LOAD)] = 100
    input_len: Annotated[int, typer.Option(help="Prompt tokens, on average.", **_LOAD)] = 1000
    output_len: Annotated[int, typer.Option(help="Answer tokens, on average.", **_LOAD)] = 100
    range_ratio: Annotated[
        float, typer.Option(help="Lengths are uniform within this share of the average.", **_LOAD)
    ] = 0.1
    lengths: Annotated[
        Path | None,
        typer.Option(help="Lengths from a file: JSON with prompt and max_tokens, or an Azure trace as CSV.", **_LOAD),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Rows taken from the file.", show_default=False, **_LOAD)] = None
    max_context: Annotated[
        int | None, typer.Option(help="Cut longer prompts of the file to so many tokens.", show_default=False, **_LOAD)
    ] = None
    compare: Annotated[
        str | None,
        typer.Option(
            help="Offload modes to run one after another on one loaded model, e.g. off,auto; off@14512 also sets the "
            "device pool's tokens.",
            **_RUN,
        ),
    ] = None
    warm_up_prompts: Annotated[
        int, typer.Option(help="Requests run before the first workload.", rich_help_panel="Run")
    ] = 8
    time_limit_s: Annotated[
        float | None, typer.Option(help="End each run after so long; what is open then counts as not done.", **_RUN)
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", **_RUN)] = None
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a timeline for Perfetto or chrome://tracing here; one file for each run.", **_RUN),
    ] = None
    trace_iterations: Annotated[int, typer.Option(help="Iterations in the timeline.", rich_help_panel="Run")] = 20
    trace_skip: Annotated[int, typer.Option(help="Iterations before it.", rich_help_panel="Run")] = 20

    def __post_init__(self) -> None:
        for name, least in (("warm_up_prompts", 0), ("trace_iterations", 1), ("trace_skip", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ConfigError(f"--time-limit-s is {self.time_limit_s}; expected more than 0")

    @property
    def specs(self) -> list[WorkloadSpec]:
        """The workloads, in the order in which they run."""
        base = WorkloadSpec(
            self.num_prompts, self.input_len, self.output_len, self.range_ratio, self.lengths, self.limit,
            self.max_context,
        )  # fmt: skip
        return [base.parse(text) for text in self.workload or ()] or [base]


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` MODEL, the engine's flags and those of `LoadOptions`, in place of its first two parameters.

    `command` takes `config: EngineConfig`, `load: LoadOptions`, then its own parameters as typer reads them.
    """
    config, _, *own = inspect.signature(command, eval_str=True).parameters.values()
    fields = dataclasses.fields(LoadOptions)
    hints = get_type_hints(LoadOptions, include_extras=True)

    @functools.wraps(command)
    def wrapped(config: Any, **values: Any) -> None:
        command(config, LoadOptions(**{field.name: values.pop(field.name) for field in fields}), **values)

    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name], default=field.default
        )
        for field in fields
    ]
    own = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
    wrapped.__signature__ = inspect.Signature([config, *own, *shared])  # type: ignore[attr-defined]
    return engine_options(wrapped)
