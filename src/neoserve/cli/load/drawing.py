"""A few layers of a trace as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoserve.core.errors import ConfigError
from neoserve.core.program import Op
from neoserve.engine.telemetry import LANES

_LANES = tuple(lane for lane in LANES if lane not in ("iterations", "compute"))
_COLOURS = {
    Op.EMBED.value: "#9aa5b1", Op.PRE.value: "#6a9bd1", Op.SEND.value: "#e45756", Op.ATTEND.value: "#54a24b",
    Op.RECV.value: "#d8d8d8", Op.POST.value: "#8fb3dd", Op.HEAD.value: "#9aa5b1",
}  # fmt: skip
_OTHER_COLOURS = {"sub-batch 0": "#9aa5b1", "sub-batch 1": "#9aa5b1", "copies": "#e45756", "workers": "#f2a541"}
_LEAST_LABELLED = 0.03
"""Of the picture's width: narrower bars have no room for a name."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What is drawn: a stage, a copy or a layer of the workers. Times in microseconds of the trace."""

    lane: str
    name: str
    begin_us: float
    length_us: float
    about: dict[str, Any]

    @property
    def end_us(self) -> float:
        return self.begin_us + self.length_us


def read_trace(path: Path) -> list[Bar]:
    """The bars of a trace that `neo bench ... --trace` wrote; raises `ConfigError` for any other file."""
    try:
        events = json.loads(path.read_text())["traceEvents"]
        bars = [
            Bar(event["cat"], event["name"], event["ts"], event["dur"], event["args"])
            for event in events
            if event["ph"] == "X"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no timeline of neo bench --trace ({type(error).__name__}: {error})") from None
    if not any(bar.lane == "iterations" for bar in bars):
        raise ConfigError(f"{path} has no iterations; trace a longer run, or lower --trace-skip")
    return bars


def window(bars: Sequence[Bar], num_layers: int, iteration: int | None = None) -> tuple[float, float]:
    """Where to look: `num_layers` layers in the middle of one iteration, of the sub-batch that goes through fewer.

    Without `iteration`, it is the one of median length, of those with host rows in two sub-batches if there are any,
    else with host rows. Raises `ConfigError` when no iteration has so many layers.
    """
    begins: dict[int, dict[int, list[float]]] = {}  # of the layers, by iteration and sub-batch, in order
    sending: set[int] = set()
    for bar in bars:
        if _op(bar) == Op.PRE.value:
            sides = begins.setdefault(bar.about["iteration"], {})
            sides.setdefault(bar.about["sub_batch"], []).append(bar.begin_us)
        elif _op(bar) == Op.SEND.value:
            sending.add(bar.about["iteration"])
    lengths = {bar.about["iteration"]: bar.length_us for bar in bars if bar.lane == "iterations"}
    fitting = [
        number
        for number, sides in begins.items()
        if iteration in (None, number) and any(len(times) > num_layers for times in sides.values())
    ]
    if not fitting:
        which = "no iteration" if iteration is None else f"no iteration {iteration}"
        raise ConfigError(
            f"the timeline has {which} with more than {num_layers} layers (a recorded lap shows none); lower --layers, "
            "or trace a run with prompts or host rows"
        )
    most = max((number in sending, len(begins[number])) for number in fitting)
    typical = [number for number in fitting if (number in sending, len(begins[number])) == most]
    chosen = sorted(typical, key=lambda number: lengths[number])[len(typical) // 2]
    times = min((times for times in begins[chosen].values() if len(times) > num_layers), key=len)
    first = (len(times) - num_layers) // 2
    return times[first], times[first + num_layers]


def draw_timeline(bars: Sequence[Bar], begin_us: float, end_us: float, path: Path, title: str) -> None:
    """Draw what overlaps [begin_us, end_us) as a PNG, a lane below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(12, 3.2), layout="constrained")
    shown = [bar for bar in bars if bar.lane in _LANES and bar.begin_us < end_us and bar.end_us > begin_us]
    for bar in shown:
        left, right = max(bar.begin_us, begin_us), min(bar.end_us, end_us)
        row = _LANES.index(bar.lane)
        axis.barh(row, right - left, left=left - begin_us, height=0.7, color=_colour(bar), edgecolor="white", lw=0.5)
        if right - left > _LEAST_LABELLED * (end_us - begin_us):
            axis.text((left + right) / 2 - begin_us, row, _label(bar), ha="center", va="center", fontsize=8)
    axis.set_yticks(range(len(_LANES)), _LANES)
    axis.set_ylim(len(_LANES) - 0.5, -0.5)
    axis.set_xlim(0, end_us - begin_us)
    axis.set_xlabel("µs")
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _op(bar: Bar) -> str | None:
    """The op of a stage on its sub-batch's lane; `None` for other bars."""
    op = bar.name.split()[0]
    return op if bar.lane.startswith("sub-batch") and op in _COLOURS else None


def _label(bar: Bar) -> str:
    return f"wait {bar.about['layer']}" if _op(bar) == Op.RECV.value else bar.name


def _colour(bar: Bar) -> str:
    op = _op(bar)
    return _OTHER_COLOURS[bar.lane] if op is None else _COLOURS[op]
