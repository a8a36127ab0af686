"""What an engine says of itself: facts at start (`EngineInfo`) and running counters (`EngineStats`)."""

from __future__ import annotations

from dataclasses import dataclass

from neoserve.core.config import ResolvedConfig


@dataclass(frozen=True)
class EngineInfo:
    """Facts of an engine that is ready.

    checkpoint_path: directory of the checkpoint's files, `None` when there is none (a dummy preset).
    eos_ids: ids that end a sequence. default_sampling: values of generation_config that replace our defaults
    (temperature, top_p, top_k, repetition_penalty). instruction_set: of the host tier, "" without one.
    """

    config: ResolvedConfig
    checkpoint_path: str | None
    eos_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    device_name: str
    instruction_set: str
    start_s: float


@dataclass(frozen=True)
class EngineStats:
    """Counters (`_total`) and gauges of an engine. Times in microseconds.

    prediction_error: median of |predicted - measured| / measured over the latest iterations.
    """

    num_running: int = 0
    num_waiting: int = 0
    device_blocks_used: int = 0
    host_blocks_used: int = 0
    prompt_tokens_total: int = 0
    device_tokens_total: int = 0
    host_tokens_total: int = 0
    iterations_total: int = 0
    pipelined_iterations_total: int = 0
    failed_iterations_total: int = 0
    migrations_to_host_total: int = 0
    migrations_to_device_total: int = 0
    sub_batch_rows: tuple[int, int] = (0, 0)
    predicted_us_total: float = 0.0
    measured_us_total: float = 0.0
    last_predicted_us: float = 0.0
    last_measured_us: float = 0.0
    prediction_error: float = 0.0
    host_busy_us_total: float = 0.0
    host_bytes_total: int = 0
