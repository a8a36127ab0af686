"""Measurements of attention as a table, as JSON and as a roofline picture."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import neoserve
from neoserve.cli.attention_measurement import Measurement

_COLUMNS = ("heads", "batch", "tokens", "set", "ms", "GB/s", "read GB/s", "ratio", "error", "torch ms")


@dataclass(frozen=True)
class Report:
    """What one run measured."""

    command: str
    num_threads: int
    kv_gib: float
    measurements: tuple[Measurement, ...]

    @property
    def read_gb_per_s(self) -> float:
        """The read bandwidth over the run, its median."""
        return median(each.read_gb_per_s for each in self.measurements)


def markdown(report: Report) -> str:
    """The run as a heading and a table."""
    lines = [
        f"Decode attention on the CPU, {date.today()}, neoserve {neoserve.__version__}",
        "",
        f"- {_cpu_name()}, {report.num_threads} threads, Linux {platform.release()}",
        f"- command: `{report.command}`",
        f'- block tables shuffled over {report.kv_gib:g} GiB; "read": what the same threads stream of it, pass by pass',
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| " + " | ".join("---" if i in (0, 3) else "---:" for i in range(len(_COLUMNS))) + " |",
    ]
    return "\n".join(lines + [f"| {' | '.join(_cells(each))} |" for each in report.measurements])


def _cells(measurement: Measurement) -> list[str]:
    case = measurement.case
    return [
        case.heads.name,
        str(case.batch),
        str(case.length),
        f"{case.instruction_set} {case.dtype} {case.block_size}",
        f"{measurement.ms:.3f}",
        f"{measurement.gb_per_s:.1f}",
        f"{measurement.read_gb_per_s:.1f}",
        f"{measurement.ratio:.2f}",
        f"{measurement.error:.1e}",
        "" if measurement.torch_ms is None else f"{measurement.torch_ms:.3f}",
    ]


def write_json(report: Report, path: Path) -> None:
    """All figures with the command, the versions and the machine."""
    import torch

    content = {
        "date": str(date.today()),
        "versions": {"neoserve": neoserve.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "machine": {"cpu": _cpu_name(), "kernel": platform.release()},
        **asdict(report),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(report: Report, path: Path) -> None:
    """GB/s against the length of the sequences, a line for each model and set, and what was streamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for color, name in enumerate(dict.fromkeys(each.case.heads.name for each in report.measurements)):
        for style, instruction_set in zip(("-", "--", ":", "-."), _instruction_sets(report), strict=False):
            points = _best_by_length(report, name, instruction_set)
            axes.plot(
                *zip(*points, strict=True), style, color=f"C{color}", marker="o", label=f"{name}, {instruction_set}"
            )
    axes.axhline(report.read_gb_per_s, color="black", label=f"streaming reads, {report.num_threads} threads")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of each sequence")
    axes.set_ylabel("GB/s of K and V")
    axes.set_title(f"Decode attention, {_cpu_name()}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _instruction_sets(report: Report) -> Sequence[str]:
    return list(dict.fromkeys(each.case.instruction_set for each in report.measurements))


def _best_by_length(report: Report, name: str, instruction_set: str) -> list[tuple[int, float]]:
    """(tokens, GB/s at the batch where it is highest), by length."""
    best: dict[int, float] = {}
    for each in report.measurements:
        if each.case.heads.name == name and each.case.instruction_set == instruction_set:
            best[each.case.length] = max(best.get(each.case.length, 0.0), each.gb_per_s)
    return sorted(best.items())


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that this process was started with, as a user would type it."""
    return " ".join(["neo", *sys.argv[1:]])
