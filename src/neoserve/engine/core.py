"""The engine core: one loop that plans an iteration while the last one runs.

    plan (scheduler) -> launch (executor) -> collect the one before -> commit (scheduler) -> events

It has no threads and no sockets of its own; `engine.client` puts it behind a process or calls it in place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from neoserve._native import WorkerPool
from neoserve.core.config import EngineConfig
from neoserve.core.plan import IterationPlan, IterationResult
from neoserve.core.request import Request, TokenEvent
from neoserve.core.stats import EngineInfo, EngineStats
from neoserve.device.base import Device
from neoserve.engine.build import build
from neoserve.engine.telemetry import Observer
from neoserve.execution.executor import Launched
from neoserve.models.weights import DecoderWeights

PIPELINE_DEPTH = 2
"""Iterations launched and not yet committed: one that runs, one that is enqueued behind it."""


class EngineCore:
    """Loads a model and generates tokens for requests. Not thread-safe: one caller drives it.

    weights: those of an engine that was closed, for the same model, dtype and device, to use again.
    observer: told of each iteration; `None` for nobody.
    Raises `ConfigError` and its kinds when what `config` asks for cannot run.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str], None] = lambda _: None,
        weights: DecoderWeights | None = None,
    ) -> None:
        start_s = time.perf_counter()
        built = build(config, progress, weights)
        self._executor = built.executor
        self._scheduler = built.scheduler
        self._in_flight: deque[Launched] = deque()
        self._free_since_s: float | None = None  # the end of the last wait, if a step follows at once
        self.observer: Observer | None = None
        self.info = EngineInfo(
            config=built.executor.config,
            checkpoint_path=built.checkpoint_path,
            eos_ids=built.eos_ids,
            default_sampling=built.default_sampling,
            device_name=built.executor.device.name,
            instruction_set=built.instruction_set,
            start_s=time.perf_counter() - start_s,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._in_flight) or self._scheduler.has_work

    @property
    def worker_pool(self) -> WorkerPool | None:
        """The host tier's workers; `None` without a host tier."""
        return self._executor.pool

    @property
    def device(self) -> Device:
        """Where the model runs."""
        return self._executor.device

    @property
    def weights(self) -> DecoderWeights:
        """The model's weights, for an engine that comes after this one."""
        return self._executor.model.weights

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestTooLongError` or `QueueFullError`."""
        self._scheduler.add(request)
        self._executor.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once, or when its laps in flight are done. Unknown ids are ignored."""
        self._scheduler.abort(request_id)
        self._executor.remove(request_id)

    def step(self) -> list[TokenEvent]:
        """Launch what can be launched, then commit the oldest iteration in flight if the pipeline is full."""
        free_since_s = self._free_since_s or time.perf_counter()
        self._free_since_s = None
        plan = self._scheduler.plan_iteration()
        if plan is not None:
            self._scheduler.observe_overhead((time.perf_counter() - free_since_s) * 1e6)
            on_stage = self.observer.launching(plan) if self.observer is not None else None
            self._in_flight.append(self._executor.launch(plan, on_stage))
        if self._in_flight and (plan is None or len(self._in_flight) >= PIPELINE_DEPTH):
            return self._commit_oldest()
        return []

    def _commit_oldest(self) -> list[TokenEvent]:
        launched = self._in_flight.popleft()
        result = self._executor.collect(launched)
        if self._in_flight:
            self._free_since_s = time.perf_counter()
        if self.observer is not None:
            self.observer.collected(launched, result)
        failed = [(launched.plan, result)] if result.error is not None else []
        if failed:
            failed += [(other.plan, self._executor.collect(other)) for other in self._in_flight]
            self._in_flight.clear()
            self._executor.recover()
        events: list[TokenEvent] = []
        for plan, outcome in failed or [(launched.plan, result)]:
            events += self._commit(plan, outcome)
        return events

    def _commit(self, plan: IterationPlan, result: IterationResult) -> list[TokenEvent]:
        events = self._scheduler.commit(plan, result)
        for event in events:
            if event.finish_reason is not None:
                self._executor.remove(event.request_id)
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges as they are now."""
        return self._scheduler.stats()

    def check_integrity(self) -> None:
        """Assert that no block and no request is lost; call it when nothing is in flight."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Wait for what is in flight and end every thread. Requests still open are lost."""
        while self._in_flight:
            self._executor.collect(self._in_flight.popleft())
        self._executor.close()
