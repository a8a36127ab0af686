"""What `/metrics` says, in Prometheus' form: vLLM's names where the meaning is the same, under `neo:`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from neoserve.core.request import FinishReason
from neoserve.core.stats import EngineInfo, EngineStats
from neoserve.engine.intake import Submission
from neoserve.engine.outputs import Delta

_LATENCY_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))


class ServerMetrics:
    """Counts what the server sees of each request, and renders it together with the engine's own counters."""

    def __init__(self, model: str, info: EngineInfo) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model, info)
        self._registry.register(self._engine)
        self._model = model
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to the first token", _LATENCY_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between two pieces of a choice", _LATENCY_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "A choice's mean time for each token after the first", _LATENCY_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the last token of a choice", _REQUEST_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a choice", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Generated tokens of a choice", _TOKENS)
        self._finished = self._counter("request_success", "Choices finished, by reason", ["finished_reason"])
        self._tokens = self._counter("generation_tokens", "Tokens generated", []).labels(model)

    def recorder(self, submissions: Sequence[Submission]) -> Recorder:
        """Times the choices of one HTTP request."""
        return Recorder(self, submissions)

    def render(self, stats: EngineStats) -> bytes:
        """The page, with the engine's counters as they were just now."""
        self._engine.stats = stats
        return generate_latest(self._registry)

    def first_token(self, wait_s: float) -> None:
        """The first token of a choice came `wait_s` after its arrival."""
        self._ttft.observe(wait_s)

    def tokens(self, num_tokens: int) -> None:
        """Tokens of a choice came."""
        self._tokens.inc(num_tokens)

    def next_tokens(self, wait_s: float) -> None:
        """More tokens of a choice came `wait_s` after the ones before."""
        self._itl.observe(wait_s)

    def finished(
        self, reason: FinishReason, num_prompt: int, num_generated: int, total_s: float, decode_s: float
    ) -> None:
        """A choice ended; decode_s: from its first to its last token."""
        self._finished.labels(self._model, reason).inc()
        self._prompt.observe(num_prompt)
        self._generated.observe(num_generated)
        self._e2e.observe(total_s)
        if num_generated > 1:
            self._tpot.observe(decode_s / (num_generated - 1))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"neo:{name}", text, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"neo:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model)


class _ChoiceTimes:
    __slots__ = ("first_s", "last_s", "num_generated")

    def __init__(self) -> None:
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_generated = 0


class Recorder:
    """The times of one HTTP request's choices."""

    def __init__(self, metrics: ServerMetrics, submissions: Sequence[Submission]) -> None:
        self._metrics = metrics
        self._submissions = submissions
        self._open = {
            (position, index): _ChoiceTimes()
            for position, submission in enumerate(submissions)
            for index in range(len(submission.requests))
        }

    def add(self, position: int, delta: Delta) -> None:
        """Record a delta at the moment at which it is read."""
        times = self._open[position, delta.index]
        now_s = time.monotonic()
        if delta.token_ids:
            self._metrics.tokens(len(delta.token_ids))
            if times.num_generated:
                self._metrics.next_tokens(now_s - times.last_s)
            else:
                times.first_s = now_s
                self._metrics.first_token(now_s - self._arrival_s(position))
            times.last_s = now_s
            times.num_generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finish(position, delta.index, delta.finish_reason)

    def close(self) -> None:
        """What has not finished by now was aborted."""
        for position, index in list(self._open):
            self._finish(position, index, "abort")

    def _finish(self, position: int, index: int, reason: FinishReason) -> None:
        times = self._open.pop((position, index))
        self._metrics.finished(
            reason,
            num_prompt=len(self._submissions[position].prompt_token_ids),
            num_generated=times.num_generated,
            total_s=time.monotonic() - self._arrival_s(position),
            decode_s=times.last_s - times.first_s,
        )

    def _arrival_s(self, position: int) -> float:
        return self._submissions[position].requests[0].arrival_s


class _Families:
    """Metric families with one label more than they name: the model."""

    def __init__(self, model: str) -> None:
        self._model = model

    def gauge(self, name: str, text: str, value: float) -> Metric:
        return self._one(GaugeMetricFamily(f"neo:{name}", text, labels=["model_name"]), value)

    def counter(self, name: str, text: str, value: float) -> Metric:
        return self._one(CounterMetricFamily(f"neo:{name}", text, labels=["model_name"]), value)

    def counters(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        return self._many(CounterMetricFamily(f"neo:{name}", text, labels=["model_name", label]), values)

    def gauges(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        return self._many(GaugeMetricFamily(f"neo:{name}", text, labels=["model_name", label]), values)

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family

    def _many(self, family: GaugeMetricFamily | CounterMetricFamily, values: dict[str, float]) -> Metric:
        for key, value in values.items():
            family.add_metric([self._model, key], value)
        return family


class _EngineCollector(Collector):
    """The engine's counters as metric families."""

    def __init__(self, model: str, info: EngineInfo) -> None:
        self.stats = EngineStats()
        self._families = _Families(model)
        self._config = info.config

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._tokens()
        yield from self._iterations()

    def _load(self) -> Iterator[Metric]:
        stats, families = self.stats, self._families
        yield families.gauge("num_requests_running", "Sequences being generated", stats.num_running)
        yield families.gauge("num_requests_waiting", "Sequences waiting for admission", stats.num_waiting)
        device_share = stats.device_blocks_used / max(1, self._config.device_blocks)
        host_share = stats.host_blocks_used / max(1, self._config.host_blocks)
        yield families.gauge("kv_cache_usage_perc", "Used share of the device pool, 1 is full", device_share)
        yield families.gauge("host_kv_cache_usage_perc", "Used share of the host pool, 1 is full", host_share)
        yield families.gauges(
            "kv_blocks_used",
            "Used blocks of each pool",
            "tier",
            {"device": stats.device_blocks_used, "host": stats.host_blocks_used},
        )

    def _tokens(self) -> Iterator[Metric]:
        stats, families = self.stats, self._families
        yield families.counter("prompt_tokens", "Prompt tokens processed", stats.prompt_tokens_total)
        yield families.counters(
            "decoded_tokens",
            "Tokens decoded by each tier; the first token of a choice comes from its prompt",
            "tier",
            {"device": stats.device_tokens_total, "host": stats.host_tokens_total},
        )
        yield families.counters(
            "migrations",
            "Sequences moved between the tiers",
            "direction",
            {"to_host": stats.migrations_to_host_total, "to_device": stats.migrations_to_device_total},
        )

    def _iterations(self) -> Iterator[Metric]:
        stats, families = self.stats, self._families
        yield families.counter("iterations", "Iterations run", stats.iterations_total)
        yield families.counter("pipelined_iterations", "Of them with host rows", stats.pipelined_iterations_total)
        yield families.counter("failed_iterations", "Of them failed in host attention", stats.failed_iterations_total)
        yield families.counter("iteration_predicted_seconds", "Predicted time, summed", stats.predicted_us_total * 1e-6)
        yield families.counter("iteration_measured_seconds", "Measured time, summed", stats.measured_us_total * 1e-6)
        yield families.gauge(
            "last_iteration_predicted_seconds", "Prediction for the last iteration", stats.last_predicted_us * 1e-6
        )
        yield families.gauge(
            "last_iteration_measured_seconds", "Time of the last iteration", stats.last_measured_us * 1e-6
        )
        yield families.gauge(
            "iteration_prediction_error", "Median relative error of recent predictions", stats.prediction_error
        )
        rows = dict(zip("01", map(float, stats.sub_batch_rows), strict=True))
        yield families.gauges("sub_batch_rows", "Rows of each sub-batch in the last iteration", "sub_batch", rows)
        yield families.counter("host_attention_busy_seconds", "Time in host attention", stats.host_busy_us_total * 1e-6)
        yield families.counter("host_attention_bytes", "KV bytes read by host attention", stats.host_bytes_total)
        rate = stats.host_bytes_total / stats.host_busy_us_total * 1e-3 if stats.host_busy_us_total else 0.0
        yield families.gauge("host_attention_gigabytes_per_second", "Mean rate of host attention while busy", rate)
