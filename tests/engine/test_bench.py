"""`neo bench`: workloads, figures, traces, and what wrong options are answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neoserve.cli.load.curve import sustained_rate
from neoserve.cli.load.report import spread, steady_rate
from neoserve.cli.load.workload import Lengths, WorkloadSpec
from neoserve.cli.main import app
from neoserve.core.config import EngineConfig, OffloadMode
from neoserve.core.errors import ConfigError, NeoError
from neoserve.core.request import SamplingParams
from neoserve.engine.core import EngineCore
from neoserve.engine.telemetry import LANES
from tests.engine.driving import generate

ENGINE = ("--device", "reference", "--dtype", "float32", "--device-kv-tokens", "160", "--host-memory", "8MiB",
          "--max-num-seqs", "8", "--warm-up-prompts", "2")  # fmt: skip
SMALL = ("--input-len", "24", "--output-len", "8", "--num-prompts", "10")

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,318,8
2023-11-16 18:17:05.9799600,110,27
"""


def neo(*arguments: str) -> None:
    app(["bench", *arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the figures and traces of two workloads in two modes."""
    folder = tmp_path_factory.mktemp("compared")
    neo("throughput", *ENGINE, "--compare", "off,all",
        "--workload", "in=24,out=8,n=10", "--workload", "in=12,out=4,n=6",
        "--json", str(folder / "figures.json"),
        "--trace", str(folder / "trace.json"), "--trace-skip", "2", "--trace-iterations", "4")  # fmt: skip
    return folder


def runs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "figures.json").read_text())["runs"]
    return found


def test_every_workload_runs_in_every_mode_on_the_same_requests(compared: Path) -> None:
    first, second = "in=24,out=8,n=10", "in=12,out=4,n=6"
    found = runs(compared)
    assert [(run["mode"], run["workload"]) for run in found] == [
        ("off", first), ("off", second), ("all", first), ("all", second)
    ]  # fmt: skip
    for off, on_host in zip(found[:2], found[2:], strict=True):
        for key in ("requests", "completed", "prompt_tokens", "output_tokens"):
            assert off[key] == on_host[key]


def test_tokens_and_iterations_add_up(compared: Path) -> None:
    for run in runs(compared):
        lengths = WorkloadSpec().parse(run["workload"]).load(seed=0).rows
        assert run["completed"] == run["requests"] == run["prefill_tokens"] == len(lengths)
        assert run["prompt_tokens"] == sum(row.num_prompt_tokens for row in lengths)
        assert run["output_tokens"] == sum(row.num_output_tokens for row in lengths)
        assert run["prefill_tokens"] + run["device_tokens"] + run["host_tokens"] == run["output_tokens"]
        assert (run["host_tokens"] == 0) == (run["mode"] == "off")
        assert (run["device_tokens"] == 0) == (run["mode"] == "all")
        assert run["output_tokens_per_s"] == pytest.approx(run["output_tokens"] / run["duration_s"])
        assert run["failed"] == run["failed_iterations"] == 0
        with_host_rows = {kind for kind in run["iterations"] if not kind.startswith("device")}
        assert bool(with_host_rows) == (run["mode"] == "all")
        assert sum(kind["total_s"] for kind in run["iterations"].values()) <= 1.5 * run["duration_s"]
        for kind in run["iterations"].values():
            assert kind["median_over_limit"] > 0.5


def test_the_machine_and_the_engines_are_in_the_figures(compared: Path) -> None:
    document = json.loads((compared / "figures.json").read_text())
    assert all(value > 0 for value in document["ceilings"].values())
    assert document["engines"]["off"]["host_kv_tokens"] == 0
    assert document["engines"]["off"]["device_kv_tokens"] == 160
    assert document["engines"]["all"]["device_kv_tokens"] == 0


def test_a_trace_has_every_lane_on_one_axis(compared: Path) -> None:
    trace = json.loads((compared / "trace-3.json").read_text())
    assert trace["otherData"]["mode"] == "all"
    events = trace["traceEvents"]
    assert tuple(event["args"]["name"] for event in events if event["name"] == "thread_name") == LANES
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in spans} >= {"iterations", "compute", "copies", "workers"}
    iterations = [event for event in spans if event["cat"] == "iterations"]
    assert len(iterations) == 4
    for iteration in iterations:
        begin, end = iteration["ts"], iteration["ts"] + iteration["dur"]
        assert iteration["args"]["predicted_us"] > 0 < iteration["args"]["measured_us"]
        stages = [s for s in spans if s["cat"].startswith("sub-batch") and
                  s["args"]["iteration"] == iteration["args"]["iteration"]]  # fmt: skip
        assert sum(stage["dur"] for stage in stages) == pytest.approx(end - begin, rel=1e-3, abs=1)
        sends = {(s["args"]["sub_batch"], s["args"]["layer"]): s for s in stages if s["name"].startswith("send")}
        recvs = {(s["args"]["sub_batch"], s["args"]["layer"]): s for s in stages if s["name"].startswith("recv")}
        layers = [e for e in spans if e["cat"] == "workers" and begin <= e["ts"] < end]
        assert layers
        for layer in layers:  # the workers attend to a layer between its SEND's begin and its RECV's end
            key = (layer["args"]["sub_batch"], layer["args"]["layer"])
            if key in sends and key in recvs:
                assert sends[key]["ts"] <= layer["ts"]
                assert layer["ts"] + layer["dur"] <= recvs[key]["ts"] + recvs[key]["dur"]


def test_a_timeline_is_drawn(compared: Path) -> None:
    neo("timeline", str(compared / "trace-3.json"), "--png", str(compared / "timeline.png"), "--layers", "2")
    assert (compared / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_latency_at_several_rates(tmp_path: Path) -> None:
    neo("latency", *ENGINE, *SMALL, "--rates", "200,50", "--json", str(tmp_path / "figures.json"),
        "--plot", str(tmp_path / "curve.png"))  # fmt: skip
    found = runs(tmp_path)
    assert [run["rate"] for run in found] == [50, 200]
    for run in found:
        assert run["completed"] == 10
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"]
        assert run["latency_per_token_ms"]["mean"] * 8.9 > run["ttft_ms"]["mean"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_arrivals_of_a_trace_wait_for_their_time(tmp_path: Path) -> None:
    lengths = tmp_path / "trace.csv"
    lengths.write_text(CSV)
    neo("latency", *ENGINE, "--lengths", str(lengths), "--max-context", "32", "--arrivals", "trace", "--rate", "4",
        "--json", str(tmp_path / "figures.json"))  # fmt: skip
    (run,) = runs(tmp_path)
    assert run["completed"] == 3
    assert run["prompt_tokens"] == 96
    assert run["output_tokens"] == 45
    assert run["duration_s"] > 0.5  # 2 gaps at 4 requests a second


def test_a_run_ends_at_its_time_limit(tmp_path: Path) -> None:
    neo("latency", *ENGINE, *SMALL, "--rate", "1", "--time-limit-s", "0.5", "--json", str(tmp_path / "figures.json"))
    (run,) = runs(tmp_path)
    assert run["completed"] < 10
    assert 0.5 <= run["duration_s"] < 5


def test_lengths_of_an_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(CSV)
    rows = WorkloadSpec(lengths=path, limit=2, max_context=4000).load(seed=0).rows
    assert [(row.num_prompt_tokens, row.num_output_tokens) for row in rows] == [(4000, 10), (318, 8)]
    whole = WorkloadSpec(lengths=path).load(seed=0)
    assert whole.recorded_s(None) == pytest.approx((0, 0.052, 2.0))
    assert whole.recorded_s(4.0) == pytest.approx((0, 0.013, 0.5))


def test_lengths_of_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "osc.json"
    path.write_text('[{"prompt": 269, "max_tokens": 42}, {"prompt": 270, "max_tokens": 52}]')
    workload = WorkloadSpec(lengths=path).load(seed=0)
    assert workload.rows == (Lengths(269, 42), Lengths(270, 52))
    assert workload.longest == 322
    with pytest.raises(ConfigError, match="no arrival times"):
        workload.recorded_s(None)


def test_synthetic_lengths_are_uniform_within_their_range_and_repeat() -> None:
    spec = WorkloadSpec(num_prompts=2000, input_len=1000, output_len=50)
    rows = spec.load(seed=3).rows
    assert rows == spec.load(seed=3).rows != spec.load(seed=4).rows
    for lengths, middle in (([r.num_prompt_tokens for r in rows], 1000), ([r.num_output_tokens for r in rows], 50)):
        assert (min(lengths), max(lengths)) == (round(0.9 * middle), round(1.1 * middle))
        assert sum(lengths) / len(lengths) == pytest.approx(middle, rel=0.01)


def test_poisson_arrivals_have_their_rate() -> None:
    arrivals = WorkloadSpec(num_prompts=4000).load(seed=0).poisson_s(5.0, seed=0)
    assert arrivals[0] == 0
    assert list(arrivals) == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(5.0, rel=0.05)


def test_the_steady_rate_leaves_the_ends_out() -> None:
    filling, steady, draining = [10.0, 20.0, 30.0], [31.0, 32.0, 33.0, 34.0, 35.0], [50.0, 70.0, 90.0]
    assert steady_rate(filling + steady + draining) == 1.0
    assert steady_rate([1.0]) is None
    assert steady_rate([]) is None


def test_percentiles_are_in_milliseconds() -> None:
    found = spread(value / 1e3 for value in range(1, 102))
    assert found == pytest.approx({"mean": 51, "p50": 51, "p90": 91, "p99": 100})
    assert spread([]) is None


def test_the_sustained_rate_lies_on_the_line_through_the_bound() -> None:
    points = [(1.0, 100.0), (2.0, 1000.0), (3.0, 3000.0)]
    assert sustained_rate(points) == pytest.approx(2.5)
    assert sustained_rate(points[:2]) == 2.0
    assert sustained_rate([(1.0, 5000.0)]) is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("throughput", "--compare", "off,some"), "'some'"),
        (("throughput", "--compare", "off@0"), "'off@0'"),
        (("throughput", "--workload", "in=10,ot=2"), "'ot=2'"),
        (("throughput", "--workload", "in=ten"), "'in=ten'"),
        (("throughput", "--num-prompts", "0"), "num_prompts"),
        (("throughput", "--range-ratio", "1.5"), "range_ratio"),
        (("throughput", "--lengths", "nowhere.json"), "nowhere.json"),
        (("throughput", *SMALL, "--json", "nowhere/figures.json"), "nowhere/figures.json"),
        (("throughput", "--trace-iterations", "0"), "--trace-iterations"),
        (("throughput", *ENGINE, "--offload", "off", "--input-len", "400", "--num-prompts", "2"), "mode off"),
        (("latency",), "--rate"),
        (("latency", "--rate", "fast"), "'fast'"),
        (("latency", "--rate", "-1"), "above 0"),
        (("latency", "--rate", "1", "--plot", "curve.png"), "several"),
        (("latency", *SMALL, "--arrivals", "trace"), "no arrival times"),
        (("timeline", "nowhere.json", "--png", "x.png"), "nowhere.json"),
    ],
)
def test_a_wrong_option_is_answered_with_one_clear_line(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(NeoError) as caught:
        neo(*arguments)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_lengths_is_refused(tmp_path: Path) -> None:
    for name, text in (("a.json", '{"prompt": 3}'), ("b.csv", "x,y\n1,2\n"), ("c.json", "[]")):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError, match=name):
            WorkloadSpec(lengths=path).load(seed=0)


def test_an_engine_runs_on_the_weights_of_the_one_before() -> None:
    modes: tuple[OffloadMode, ...] = ("off", "all")
    tokens, weights = [], None
    for offload in modes:
        config = EngineConfig(device="reference", dtype="float32", offload=offload, host_memory_bytes=2**23,
                              device_kv_tokens=160, max_num_seqs=8)  # fmt: skip
        core = EngineCore(config, weights=weights)
        try:
            assert weights is None or core.weights is weights
            weights = core.weights
            tokens.append(generate(core, [[5, 6, 7], [8, 9]], SamplingParams(temperature=0, max_tokens=8)))
        finally:
            core.close()
    assert tokens[0] == tokens[1]
