"""The sampling flags that `neo generate` and `neo chat` share."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Sampling"

MaxTokens = Annotated[int | None, typer.Option(help="Tokens of an answer, at most.", rich_help_panel=_PANEL)]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; default: the checkpoint's.", rich_help_panel=_PANEL)
]
TopP = Annotated[
    float | None, typer.Option(help="Nucleus sampling; default: the checkpoint's.", rich_help_panel=_PANEL)
]
TopK = Annotated[
    int | None, typer.Option(help="Likeliest tokens kept; default: the checkpoint's.", rich_help_panel=_PANEL)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String that ends an answer; may be given several times.", rich_help_panel=_PANEL),
]


def given(**values: object) -> dict[str, object]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}
