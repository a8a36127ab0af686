"""Figures of runs for people: a line for each run, a table for each workload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from neoserve.cli.load.session import Outcome

WIDTH = 160
"""Columns of a table in a file, where no terminal sets them."""

Figures = dict[str, Any]


def summary(outcome: Outcome) -> str:
    """The run in one line."""
    figures = outcome.figures
    rate = "" if outcome.case.rate is None else f" at {outcome.case.rate:g}/s"
    return (
        f"{outcome.mode.name}, {outcome.case.workload.name}{rate}: {figures['completed']} of {figures['requests']} in "
        f"{figures['duration_s']:.1f} s, {figures['requests_per_s']:.3f} requests/s (steady "
        f"{_number(figures['steady_requests_per_s'], 3)}), {figures['output_tokens_per_s']:.1f} output tokens/s, "
        f"TTFT {_spread(figures['ttft_ms'])}, TPOT {_spread(figures['tpot_ms'])} ms"
    )


def print_tables(outcomes: Sequence[Outcome]) -> None:
    """A table for each workload, a column for each mode; where there are several, the ratio to the first one's rates
    in parentheses."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    cases = {id(outcome.case): outcome.case for outcome in outcomes}
    for case in cases.values():
        members = [outcome for outcome in outcomes if outcome.case is case]
        rate = "" if case.rate is None else f", {case.rate:g} requests/s arriving"
        table = Table(title=f"{case.workload.name}{rate}", title_justify="left", box=None, padding=(0, 2))
        table.add_column("")
        for outcome in members:
            table.add_column(outcome.mode.name, justify="right")
        for label, cells in _rows([outcome.figures for outcome in members]):
            table.add_row(label, *cells)
        console.print(table)
        console.print()


def _rows(runs: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    rows = [(label, _rates([run[key] for run in runs], digits)) for label, key, digits in _RATES]
    rows += [(label, [cell(run) for run in runs]) for label, cell in _CELLS]
    kinds = sorted({kind for run in runs for kind in run["iterations"]})
    rows += [
        (f"{kind}: iterations, median, over limit", [_kind(run["iterations"].get(kind)) for run in runs])
        for kind in kinds
    ]
    return rows


_RATES = (
    ("requests/s", "requests_per_s", 3),
    ("requests/s, steady", "steady_requests_per_s", 3),
    ("output tokens/s", "output_tokens_per_s", 1),
    ("total tokens/s", "total_tokens_per_s", 1),
)
_CELLS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("completed", lambda run: f"{run['completed']} of {run['requests']}"),
    ("duration", lambda run: f"{run['duration_s']:.1f} s"),
    ("TTFT p50 / p90 / p99, ms", lambda run: _spread(run["ttft_ms"])),
    ("TPOT p50 / p90 / p99, ms", lambda run: _spread(run["tpot_ms"])),
    ("ITL p50 / p90 / p99, ms", lambda run: _spread(run["itl_ms"])),
    ("latency / token, mean", lambda run: _mean(run["latency_per_token_ms"])),
    ("tokens decoded, device + host", lambda run: f"{run['device_tokens']} + {run['host_tokens']}"),
    ("migrations, to host + to device", lambda run: f"{run['migrations_to_host']} + {run['migrations_to_device']}"),
    ("host tier busy", lambda run: f"{run['host_busy_share']:.0%}"),
    ("host tier reads, GB/s", lambda run: _number(run["host_gb_per_s"], 1)),
    ("prediction error, median", lambda run: _percent(run["prediction_error"])),
)


def _rates(values: Sequence[float | None], digits: int) -> list[str]:
    first, *others = values
    cells = [_number(first, digits)]
    for value in others:
        ratio = f" ({value / first:.2f}x)" if value is not None and first else ""
        cells.append(_number(value, digits) + ratio)
    return cells


def _kind(figures: Figures | None) -> str:
    if figures is None:
        return "0"
    limit = figures["median_over_limit"]
    over = f", {limit:.2f}x" if limit is not None else ""
    return f"{figures['count']}, {figures['median_ms']:.1f} ms{over}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _mean(figures: dict[str, float] | None) -> str:
    return "-" if figures is None else f"{figures['mean']:.1f} ms"


def _spread(figures: dict[str, float] | None) -> str:
    return "-" if figures is None else " / ".join(f"{figures[name]:.1f}" for name in ("p50", "p90", "p99"))
