"""The figures of a run, as plain values for tables and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from neoserve.cli.load.driver import Answer, Drive
from neoserve.cli.load.limits import Ceilings, floor_us
from neoserve.core.config import ResolvedConfig
from neoserve.engine.telemetry import Iteration

STEADY = (0.3, 0.7)
"""Between these shares of the completions a run is neither filling up nor running dry."""

Figures = dict[str, Any]


def figures(run: Drive, iterations: Sequence[Iteration], config: ResolvedConfig, ceilings: Ceilings) -> Figures:
    """All figures of one run. device_tokens, host_tokens: that decodes of the tier yielded; prefill_tokens: that
    prefill yielded, one a request. Percentiles are in milliseconds."""
    done = [answer for answer in run.answers if answer.completed]
    before, after, duration_s = run.before, run.after, run.duration_s
    num_output = sum(len(answer.token_s) for answer in run.answers)
    num_prompt = after.prompt_tokens_total - before.prompt_tokens_total
    num_device = after.device_tokens_total - before.device_tokens_total
    num_host = after.host_tokens_total - before.host_tokens_total
    host_busy_us = after.host_busy_us_total - before.host_busy_us_total
    host_bytes = after.host_bytes_total - before.host_bytes_total
    return {
        "requests": len(run.answers),
        "completed": len(done),
        "failed": sum(answer.finish_reason == "error" for answer in run.answers),
        "duration_s": duration_s,
        "requests_per_s": len(done) / duration_s,
        "steady_requests_per_s": steady_rate([answer.token_s[-1] for answer in done]),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "prefill_tokens": num_output - num_device - num_host,
        "device_tokens": num_device,
        "host_tokens": num_host,
        "output_tokens_per_s": num_output / duration_s,
        "total_tokens_per_s": (num_prompt + num_output) / duration_s,
        "ttft_ms": spread(answer.token_s[0] - answer.due_s for answer in run.answers if answer.token_s),
        "tpot_ms": spread(map(_per_later_token, (answer for answer in done if len(answer.token_s) > 1))),
        "itl_ms": spread(gap for answer in run.answers for gap in _gaps(answer)),
        "latency_per_token_ms": spread((a.token_s[-1] - a.due_s) / len(a.token_s) for a in done),
        "iterations": by_kind(iterations, config, ceilings),
        "prediction_error": _prediction_error(iterations),
        "host_busy_share": host_busy_us / 1e6 / duration_s,
        "host_gb_per_s": host_bytes / host_busy_us / 1e3 if host_busy_us else None,
        "migrations_to_host": after.migrations_to_host_total - before.migrations_to_host_total,
        "migrations_to_device": after.migrations_to_device_total - before.migrations_to_device_total,
        "failed_iterations": after.failed_iterations_total - before.failed_iterations_total,
    }


def steady_rate(completed_s: Iterable[float]) -> float | None:
    """Completions a second in the `STEADY` part of the run; `None` when there are too few of them to tell."""
    times = sorted(completed_s)
    first, last = (round(share * (len(times) - 1)) for share in STEADY) if times else (0, 0)
    if first == last or times[last] <= times[first]:
        return None
    return (last - first) / (times[last] - times[first])


def spread(seconds: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; `None` of nothing."""
    values = np.array(list(seconds)) * 1e3
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99}


def by_kind(iterations: Sequence[Iteration], config: ResolvedConfig, ceilings: Ceilings) -> dict[str, Figures]:
    """How many iterations of each kind there were and what they took, measured over predicted and over the floor."""
    kinds: dict[str, list[Iteration]] = {}
    for iteration in iterations:
        kinds.setdefault(iteration.kind.value if iteration.kind else "migration", []).append(iteration)
    return {
        kind: {
            "count": len(members),
            "total_s": sum(member.measured_us for member in members) / 1e6,
            "median_ms": float(np.median([member.measured_us for member in members])) / 1e3,
            "prediction_error": _prediction_error(members),
            "median_over_limit": _over_limit(members, config, ceilings),
        }
        for kind, members in sorted(kinds.items())
    }


def _prediction_error(iterations: Sequence[Iteration]) -> float | None:
    """Median of |predicted - measured| / measured."""
    errors = [abs(i.predicted_us - i.measured_us) / i.measured_us for i in iterations if i.kind and i.measured_us]
    return float(np.median(errors)) if errors else None


def _over_limit(iterations: Sequence[Iteration], config: ResolvedConfig, ceilings: Ceilings) -> float | None:
    ratios = [i.measured_us / floor for i in iterations if (floor := floor_us(i, config, ceilings))]
    return float(np.median(ratios)) if ratios else None


def _per_later_token(answer: Answer) -> float:
    return (answer.token_s[-1] - answer.token_s[0]) / (len(answer.token_s) - 1)


def _gaps(answer: Answer) -> Iterable[float]:
    return (later - earlier for earlier, later in pairwise(answer.token_s))
