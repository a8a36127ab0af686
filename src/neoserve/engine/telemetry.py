"""What iterations did: counters for `EngineStats`, predicted against measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from neoserve.core.plan import IterationPlan, IterationResult, Tier
from neoserve.core.request import TokenEvent
from neoserve.core.stats import EngineStats
from neoserve.scheduling.scheduler import Scheduler


class Telemetry:
    """Sums over an engine's life."""

    def __init__(self) -> None:
        self._stats = EngineStats()

    def record(self, plan: IterationPlan, result: IterationResult, events: Iterable[TokenEvent]) -> None:
        """Add one committed iteration."""
        old = self._stats
        host_tokens = sum(event.num_host_tokens for event in events)
        all_tokens = sum(len(event.token_ids) for event in events)
        to_host = sum(migration.source is Tier.DEVICE for migration in plan.migrations)
        rows = {sub_batch.index: sub_batch.num_rows for sub_batch in plan.begins}
        self._stats = replace(
            old,
            prompt_tokens_total=old.prompt_tokens_total
            + sum(rows.count for sub_batch in plan.ends for rows in sub_batch.prefill),
            device_tokens_total=old.device_tokens_total + all_tokens - host_tokens,
            host_tokens_total=old.host_tokens_total + host_tokens,
            iterations_total=old.iterations_total + 1,
            pipelined_iterations_total=old.pipelined_iterations_total + (len(plan.spans) > 1),
            failed_iterations_total=old.failed_iterations_total + (result.error is not None),
            migrations_to_host_total=old.migrations_to_host_total + to_host,
            migrations_to_device_total=old.migrations_to_device_total + len(plan.migrations) - to_host,
            sub_batch_rows=(rows.get(0, 0), rows.get(1, 0)),
            predicted_us_total=old.predicted_us_total + plan.predicted_us,
            measured_us_total=old.measured_us_total + result.elapsed_us,
            last_predicted_us=plan.predicted_us,
            last_measured_us=result.elapsed_us,
            host_busy_us_total=old.host_busy_us_total + result.host_busy_us,
            host_bytes_total=old.host_bytes_total + result.host_bytes,
        )

    def stats(self, scheduler: Scheduler) -> EngineStats:
        """The sums, with the scheduler's gauges of this moment."""
        return replace(
            self._stats,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            device_blocks_used=scheduler.device_blocks_used,
            host_blocks_used=scheduler.host_blocks_used,
        )
