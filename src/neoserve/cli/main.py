"""The command `neo`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import neoserve
from neoserve.cli.bench import BenchCommands
from neoserve.cli.chat import chat
from neoserve.cli.generate import generate
from neoserve.cli.info import info
from neoserve.cli.options import engine_options
from neoserve.cli.serve import serve
from neoserve.core.errors import NeoError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)
app.command()(engine_options(serve))
app.command()(engine_options(generate))
app.command()(engine_options(chat))
app.command()(engine_options(info))
app.add_typer(typer.Typer(cls=BenchCommands, no_args_is_help=True), name="bench", help="Measure parts of NEO.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neo {neoserve.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """NEO serves large language models and keeps part of the KV cache, and its attention, on the CPU."""


def main() -> None:
    """Run `neo`. An error of ours is one line and exit code 2, not a traceback."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except NeoError as error:
        sys.exit(_fail(error))


def _fail(error: NeoError) -> int:
    print(f"neo: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
