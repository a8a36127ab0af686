"""`neo bench timeline`: draw what `--trace` wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from neoserve.core.errors import ConfigError


def timeline(
    trace: Annotated[Path, typer.Argument(help="Timeline that another benchmark wrote with --trace.")],
    png: Annotated[Path, typer.Option(help="Picture to draw.")],
    layers: Annotated[int, typer.Option(help="Layers to show.", min=1)] = 2,
    iteration: Annotated[
        int | None, typer.Option(help="Iteration to show; default: a typical one.", show_default=False)
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
) -> None:
    """Draw a few layers from the middle of an iteration: sub-batches, copies and workers beside each other."""
    from neoserve.cli.load.drawing import draw_timeline, read_trace, window

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("neo bench timeline needs matplotlib; install it, or neoserve[bench]")
    if png.suffix != ".png" or not png.parent.is_dir():
        raise ConfigError(f"--png is {png}; expected a file ending in .png in a directory that is there")
    bars = read_trace(trace)
    begin_us, end_us = window(bars, layers, iteration)
    draw_timeline(bars, begin_us, end_us, png, title)
