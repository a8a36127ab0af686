"""What iterations did: a record of each one (`IterationLog`), and of a few a timeline of every stage (`Trace`).

Both watch an `EngineCore` as its observer. A trace is written in Chrome's format, which Perfetto and
chrome://tracing show: one lane each for iterations, compute, the stages of each sub-batch, copies and workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from neoserve.core.plan import IterationPlan, IterationResult
from neoserve.core.program import Op, Stage
from neoserve.device.base import Copy, Device, Mark
from neoserve.execution.executor import Launched
from neoserve.execution.issue import OnStage
from neoserve.scheduling.cost import Kind
from neoserve.scheduling.load import Load

LANES = ("iterations", "compute", "sub-batch 0", "sub-batch 1", "copies", "workers")
_COPIES = {"out": "q k v out", "back": "output back", "tiers": "KV between tiers"}
_WORK = frozenset(Op) - {Op.SEND, Op.RECV}  # what the compute stream does itself; RECV waits, SEND goes beside it
_STAGES_OF_RECORDED_LAP = 3  # EMBED, HEAD and the end


class Observer(Protocol):
    """Who watches an engine's iterations, from the thread that drives it."""

    def launching(self, plan: IterationPlan) -> OnStage | None:
        """Before an iteration is enqueued; what is returned is told of its stages."""

    def collected(self, launched: Launched, result: IterationResult) -> None:
        """Once an iteration's result is there; oldest first."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an iteration does of one lap. share: of its steps. ends: whether the last step is among them."""

    share: float
    ends: bool
    load: Load


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration that was carried out. kind: `None` when it only migrates."""

    kind: Kind | None
    predicted_us: float
    measured_us: float
    parts: tuple[Part, ...]


class IterationLog:
    """An observer that keeps a record of every iteration, and lets a trace watch too."""

    def __init__(self, num_layers: int, trace: Trace | None = None) -> None:
        self.iterations: list[Iteration] = []
        self._num_steps = num_layers + 1
        self._trace = trace
        self._loads: dict[int, Load] = {}  # by lap, while it is in flight

    def launching(self, plan: IterationPlan) -> OnStage | None:
        for sub_batch in plan.begins:
            self._loads[sub_batch.lap] = Load.of(sub_batch)
        return self._trace.launching(plan) if self._trace is not None else None

    def collected(self, launched: Launched, result: IterationResult) -> None:
        plan = launched.plan
        if result.error is None:
            self.iterations.append(
                Iteration(self._kind(launched), plan.predicted_us, result.elapsed_us, self._parts(launched))
            )
        for sub_batch in plan.ends:
            del self._loads[sub_batch.lap]
        if self._trace is not None:
            self._trace.collected(launched, result)

    def _kind(self, launched: Launched) -> Kind | None:
        spans = launched.plan.spans
        if not spans:
            return None
        return Kind.of(spans, prefill=any(lap.sub_batch.prefill for lap in launched.laps.values()))

    def _parts(self, launched: Launched) -> tuple[Part, ...]:
        return tuple(
            Part(
                share=span.num_steps / self._num_steps,
                ends=span.stop_step == self._num_steps,
                load=self._loads[launched.laps[span.sub_batch].sub_batch.lap],
            )
            for span in launched.plan.spans
        )


@dataclass(frozen=True, slots=True)
class _HostLap:
    """Host attention of one lap. layers: layer, start and end in ns of each layer done so far."""

    sub_batch: int
    num_rows: int
    layer_bytes: int
    layers: npt.NDArray[np.int64]


@dataclass(slots=True)
class _Traced:
    """One iteration of the trace. stages: each stage, `None` for the end, with where the stream begins it."""

    plan: IterationPlan
    stages: list[tuple[Stage | None, Mark]] = field(default_factory=list)
    elapsed_us: float = 0.0


class Trace:
    """Watches `num_iterations` iterations stage by stage, after the first `num_skipped`; memory is bounded by both."""

    def __init__(self, device: Device, num_iterations: int, num_skipped: int = 0) -> None:
        self._device = device
        self._first = num_skipped
        self._stop = num_skipped + num_iterations
        self._num_seen = 0
        self._traced: dict[int, _Traced] = {}
        self._copies: list[Copy] = []
        self._host_laps: dict[int, _HostLap] = {}

    def launching(self, plan: IterationPlan) -> OnStage | None:
        """Before an iteration is enqueued; the hook for its stages, or `None` when it is not traced."""
        if not plan.spans:
            return None
        self._num_seen += 1
        if not self._first < self._num_seen <= self._stop:
            return None
        traced = self._traced[plan.iteration] = _Traced(plan)
        self._device.on_copy = self._copies.append  # migrations go before the stages

        def on_stage(stage: Stage | None) -> None:
            self._device.on_copy = None if stage is None else self._copies.append
            traced.stages.append((stage, self._device.mark()))

        return on_stage

    def collected(self, launched: Launched, result: IterationResult) -> None:
        """Once an iteration's result is there."""
        traced = self._traced.get(launched.plan.iteration)
        if traced is None:
            return
        traced.elapsed_us = result.elapsed_us
        for lap in launched.laps.values():
            if lap.native is not None:
                rows = lap.sub_batch.host_decode
                self._host_laps[lap.sub_batch.lap] = _HostLap(
                    lap.sub_batch.index, len(rows), lap.native.kv_bytes, lap.native.timeline()
                )

    def write(self, path: Path, facts: Mapping[str, str]) -> int:
        """Write the timeline to `path`, with `facts` beside it; returns the number of iterations in it.

        Waits until the device is idle. Raises `OSError` when the file cannot be written.
        """
        self._device.on_copy = None
        events = [*_lane_names(), *self._events()]
        path.write_text(json.dumps({"displayTimeUnit": "ms", "otherData": dict(facts), "traceEvents": events}))
        return len(self._traced)

    def _events(self) -> Iterator[dict[str, Any]]:
        followed = [traced for traced in self._traced.values() if traced.stages]
        stage_marks = [mark for traced in followed for _, mark in traced.stages]
        copy_marks = [mark for copy in self._copies for mark in (copy.begin, copy.end)]
        if not stage_marks:
            return
        times_ns = self._device.times_ns(stage_marks + copy_marks)
        start_ns, stop_ns = (bound(times_ns[: len(stage_marks)]) for bound in (min, max))
        stage_ns, copy_ns = iter(times_ns), iter(times_ns[len(stage_marks) :])
        for traced in followed:
            at_us = [(next(stage_ns) - start_ns) / 1e3 for _ in traced.stages]
            yield from _iteration_events(traced, at_us)
        for copy in self._copies:
            begin_us, end_us = ((next(copy_ns) - start_ns) / 1e3 for _ in range(2))
            if begin_us >= 0:  # one before the first stage belongs to an iteration that is not followed
                yield _span("copies", _COPIES[copy.what], begin_us, end_us, sub_batch=copy.channel)
        for lap in self._host_laps.values():
            for layer, begin_ns, end_ns in lap.layers.tolist():
                if start_ns <= begin_ns <= end_ns <= stop_ns:
                    yield _span(
                        "workers", f"attend {layer}", (begin_ns - start_ns) / 1e3, (end_ns - start_ns) / 1e3,
                        sub_batch=lap.sub_batch, layer=layer, rows=lap.num_rows,
                        gb_per_s=lap.layer_bytes / max(1, end_ns - begin_ns),
                    )  # fmt: skip


def _lane_names() -> Iterator[dict[str, Any]]:
    for tid, lane in enumerate(LANES):
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": lane}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": tid, "args": {"sort_index": tid}}


def _span(lane: str, name: str, begin_us: float, end_us: float, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": lane, "pid": 1, "tid": LANES.index(lane),
        "ts": round(begin_us, 3), "dur": round(max(0.0, end_us - begin_us), 3), "args": args,
    }  # fmt: skip


def _iteration_events(traced: _Traced, at_us: list[float]) -> Iterator[dict[str, Any]]:
    """Prediction and measurement of one iteration, and its stages: each lasts until the next one begins."""
    plan = traced.plan
    times = {"predicted_us": round(plan.predicted_us, 1), "measured_us": round(traced.elapsed_us, 1)}
    yield _span("iterations", f"iteration {plan.iteration}", at_us[0], at_us[-1], iteration=plan.iteration, **times)
    yield {"ph": "C", "name": "iteration", "pid": 1, "ts": round(at_us[0], 3), "args": times}
    is_recorded = len(traced.stages) == _STAGES_OF_RECORDED_LAP
    for (stage, _), begin_us, end_us in zip(traced.stages, at_us, at_us[1:], strict=False):
        assert stage is not None
        about = {"layer": stage.layer, "sub_batch": stage.sub_batch, "iteration": plan.iteration}
        name = "recorded lap" if is_recorded and stage.op is Op.EMBED else f"{stage.op.value} {stage.layer}"
        yield _span(f"sub-batch {stage.sub_batch}", name, begin_us, end_us, **about)
        if stage.op in _WORK:
            yield _span("compute", name, begin_us, end_us, **about)
