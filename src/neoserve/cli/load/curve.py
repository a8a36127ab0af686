"""The load-latency curve: latency against the rate at which requests arrive, a line for each mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neoserve.cli.load.session import Outcome
from neoserve.core.errors import ConfigError

BOUND_MS = 2000.0
"""Mean latency per token up to which a rate counts as sustained."""

Points = list[tuple[float, float]]


def check_plot(path: Path, rates: Sequence[float]) -> None:
    """Raise `ConfigError` if nothing could be drawn, before anything runs."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install it, or neoserve[bench]")
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ConfigError(f"--plot is {path}; expected a file ending in .png in a directory that is there")
    if len(rates) < 2:
        raise ConfigError("--plot draws against the rate; give several with --rates, as in 0.2,0.4,0.8")


def curves(outcomes: Sequence[Outcome], figure: str) -> dict[str, Points]:
    """(rate, mean of `figure` in ms) by workload and mode, in order of rate; runs without one are left out."""
    several = len({outcome.case.workload.name for outcome in outcomes}) > 1
    lines: dict[str, Points] = {}
    for outcome in outcomes:
        spread, rate = outcome.figures[figure], outcome.case.rate
        if spread is not None and rate is not None:
            name = f"{outcome.mode.name}, {outcome.case.workload.name}" if several else outcome.mode.name
            lines.setdefault(name, []).append((rate, spread["mean"]))
    return lines


def sustained_rate(points: Points, bound_ms: float = BOUND_MS) -> float | None:
    """The highest rate at which the latency is within the bound, between two measured ones on the line through them;
    `None` when the lowest is beyond it already."""
    sustained = None
    for (rate, value), (next_rate, next_value) in zip(points, points[1:] + points[-1:], strict=True):
        if value > bound_ms:
            break
        sustained = rate
        if next_value > bound_ms:
            sustained += (next_rate - rate) * (bound_ms - value) / (next_value - value)
    return sustained


def print_curve(outcomes: Sequence[Outcome]) -> None:
    """The curve as a table, and what each mode sustains."""
    table = Table(title="mean latency per token and mean TTFT, ms", title_justify="left", box=None, padding=(0, 2))
    table.add_column("")
    latency, ttft = curves(outcomes, "latency_per_token_ms"), curves(outcomes, "ttft_ms")
    for rate, _ in next(iter(latency.values()), []):
        table.add_column(f"{rate:g}/s", justify="right")
    table.add_column(f"sustained at {BOUND_MS / 1e3:g} s", justify="right")
    for name, points in latency.items():
        first = dict(ttft[name])
        sustained = sustained_rate(points)
        table.add_row(
            name,
            *(f"{value:.1f} / {first[rate]:.0f}" for rate, value in points),
            "-" if sustained is None else f"{'at least ' if sustained == points[-1][0] else ''}{sustained:.3g}/s",
        )
    Console(highlight=False).print(table)


def draw_curve(outcomes: Sequence[Outcome], path: Path) -> None:
    """Latency per token and time to first token against the rate, as a PNG."""
    draw(curves(outcomes, "latency_per_token_ms"), curves(outcomes, "ttft_ms"), path)


def draw(latency: Mapping[str, Points], ttft: Mapping[str, Points], path: Path) -> None:
    """Points (rate, mean in ms) of each mode, latency per token above time to first token, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 7), layout="constrained")
    panels = ((latency, "mean latency per token, s"), (ttft, "mean time to first token, s"))
    for axis, (lines, label) in zip(axes, panels, strict=True):
        for mode, points in lines.items():
            axis.plot([rate for rate, _ in points], [ms / 1e3 for _, ms in points], marker="o", label=mode)
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.grid(True, alpha=0.3)
        axis.legend(title="--offload")
    axes[-1].set_xlabel("requests/s")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
