"""Run the scheduler without an engine: what it would choose for a workload, and how long that would take.

    python tools/simulate.py llama-3.1-70b --costs ~/.cache/neoserve/costs-....json --device-kv-tokens 20000 \
        --max-num-batched-tokens 2048 --workload in=1000,out=100,n=300 [--rates 1,2,3 --plot latency.png]

Iterations take what the cost table says, so this shows decisions, not speeds; `neo bench` measures. The table is one
that an engine measured at its start and keeps in its cache folder, or rough figures of an H200 with a 16-core Xeon.
With --truth they take what another table says, as on a machine that is not what it was when it was measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

from neoserve.cli.load.curve import Points, check_plot, draw
from neoserve.cli.load.report import spread, steady_rate
from neoserve.cli.load.session import Mode
from neoserve.cli.load.workload import Workload, WorkloadSpec, parse_rates
from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import ConfigError
from neoserve.core.plan import IterationPlan, IterationResult, SampledToken
from neoserve.engine.core import PIPELINE_DEPTH
from neoserve.models.families import parse_config
from neoserve.models.presets import PRESETS
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.load import Load
from neoserve.scheduling.scheduler import Scheduler
from neoserve.scheduling.table import CostTable

BLOCK_SIZE = 16


class Simulation:
    """One workload in one offload mode. Times in seconds of the simulated machine.

    table, truth: what the scheduler is told at first, and what iterations take.
    arrivals_s: when each request comes, in order.
    kinds: of each kind of iteration how many there were, their time, and the rows of prompts, device decodes and host
    decodes that they ended.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        table: CostTable,
        truth: CostTable,
        workload: Workload,
        arrivals_s: Sequence[float],
    ) -> None:
        self._truth = CostModel(truth, config.shape)
        self._scheduler = Scheduler(config, CostModel(table, config.shape))
        requests = workload.requests(config.shape.vocab_size, config.seed, "r")
        self._due_s = {request.request_id: due_s for request, due_s in zip(requests, arrivals_s, strict=True)}
        self._coming = deque(requests)
        self._open: deque[tuple[IterationPlan, IterationResult, float]] = deque()  # the last is when it ends
        self._loads: dict[int, Load] = {}  # of the laps in flight, by sub-batch
        self._now_s = self._device_s = 0.0  # the engine's time, and when the device has done all that is launched
        self._token_s: dict[str, list[float]] = defaultdict(list)
        self.kinds: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)

    def run(self) -> None:
        """To the end, one iteration planned ahead of the one that runs, as the engine does."""
        while True:
            if not (self._open or self._scheduler.has_work):
                if not self._coming:
                    return
                self._now_s = max(self._now_s, self._due_s[self._coming[0].request_id])
            while self._coming and self._due_s[self._coming[0].request_id] <= self._now_s:
                self._scheduler.add(self._coming.popleft())
            plan = self._scheduler.plan_iteration()
            if plan is not None:
                self._launch(plan)
            if plan is None or len(self._open) == PIPELINE_DEPTH:
                self._commit()

    def _launch(self, plan: IterationPlan) -> None:
        self._loads.update({sub_batch.index: Load.of(sub_batch) for sub_batch in plan.begins})
        elapsed_us = 0.0
        if plan.spans:
            price = self._truth.price(plan.spans, self._loads)
            elapsed_us = price.total_us
            counts = self.kinds[price.kind.value]
            counts[0] += 1
            counts[1] += elapsed_us / 1e6
            counts[2] += sum(rows.count for sub_batch in plan.begins for rows in sub_batch.prefill)
            counts[3] += sum(len(sub_batch.device_decode) for sub_batch in plan.ends)
            counts[4] += sum(len(sub_batch.host_decode) for sub_batch in plan.ends)
        self._device_s = max(self._device_s, self._now_s) + elapsed_us / 1e6
        tokens = [
            SampledToken(rows.request_id, 0 if rows.samples else None) for ended in plan.ends for rows in ended.rows
        ]
        busy_us = sum(self._truth.host_lap_us(self._loads[ended.index]) for ended in plan.ends)
        self._open.append((plan, IterationResult(tuple(tokens), elapsed_us, busy_us), self._device_s))

    def _commit(self) -> None:
        plan, result, self._now_s = self._open.popleft()
        for event in self._scheduler.commit(plan, result):
            self._token_s[event.request_id] += [self._now_s] * len(event.token_ids)

    def report_latency(self, mode: str, rate: float) -> tuple[float, ...]:
        """Print what the requests' clients saw; returns the means of latency per token and TTFT, in ms."""
        answers = [(self._due_s[name], times) for name, times in self._token_s.items()]
        seen = {
            "latency per token": spread((times[-1] - due_s) / len(times) for due_s, times in answers),
            "TTFT": spread(times[0] - due_s for due_s, times in answers),
            "TPOT": spread((times[-1] - times[0]) / (len(times) - 1) for _, times in answers if len(times) > 1),
        }
        said = [
            f"{name} mean {s['mean']:.1f}, p50 {s['p50']:.1f}, p90 {s['p90']:.1f} ms" for name, s in seen.items() if s
        ]
        print(f"{mode} at {rate:g}/s:", "; ".join(said))
        return tuple(s["mean"] for s in (seen["latency per token"], seen["TTFT"]) if s)

    def report(self, mode: str) -> None:
        """Print the rates, and what the iterations of each kind did."""
        ends_s = [times[-1] for times in self._token_s.values()]
        rate, steady = len(ends_s) / self._now_s, steady_rate(ends_s)
        busy = self._scheduler.stats().host_busy_us_total / 1e6 / self._now_s
        said = "-" if steady is None else f"{steady:.2f}"
        print(f"{mode}: {rate:.2f} requests/s, steady {said}, host tier busy {busy:.0%}")
        for kind, (number, total_s, prompt_rows, device, host) in sorted(self.kinds.items()):
            each = f"{1e3 * total_s / number:.1f} ms, rows {prompt_rows / number:.0f}"
            print(f"  {kind:18}{number:6.0f} x {each} + {device / number:.1f} + {host / number:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--costs", type=Path, help="cost table that an engine measured")
    parser.add_argument("--truth", type=Path, help="cost table of what iterations take, without it that of --costs")
    parser.add_argument("--workload", default="in=1000,out=100,n=300", help="as for neo bench")
    parser.add_argument("--rates", help="requests a second, such as 1,2,3; without it all come at the start")
    parser.add_argument("--plot", type=Path, help="draw latency against rate into this PNG")
    parser.add_argument("--compare", default="off,auto", help="offload modes, as for neo bench")
    parser.add_argument("--device-kv-tokens", type=int, default=20_000)
    parser.add_argument("--host-kv-tokens", type=int, default=180_000)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=160)
    parser.add_argument("--target-tpot-ms", type=float)
    parser.add_argument("--target-ttft-ms", type=float)
    options = parser.parse_args()

    shape = parse_config(PRESETS[options.model], {}, options.model).shape
    table = CostTable.from_json(options.costs.read_text()) if options.costs else CostTable.rough(shape)
    truth = CostTable.from_json(options.truth.read_text()) if options.truth else table
    try:
        workload = WorkloadSpec().parse(options.workload).load(seed=0)
        modes = [Mode.parse(text) for text in options.compare.split(",")]
        rates = parse_rates(options.rates)
        if options.plot:
            check_plot(options.plot, rates)
    except ConfigError as error:
        parser.error(str(error))
    max_model_len = workload.longest
    latency: dict[str, Points] = defaultdict(list)
    ttft: dict[str, Points] = defaultdict(list)
    for mode in modes:
        device_kv_tokens = mode.device_kv_tokens or options.device_kv_tokens
        config = ResolvedConfig(
            model_name=options.model, shape=shape, dtype="bfloat16", device="cuda", seed=0,
            max_model_len=max_model_len, max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens, block_size=BLOCK_SIZE, offload=mode.offload,
            device_blocks=0 if mode.offload == "all" else device_kv_tokens // BLOCK_SIZE,
            host_blocks=0 if mode.offload == "off" else options.host_kv_tokens // BLOCK_SIZE,
            staging_blocks=-(-(max_model_len + 2 * options.max_num_batched_tokens) // BLOCK_SIZE),
            worker_cpus=(0,), host_deadline_s=1.0,
            target_tpot_ms=options.target_tpot_ms, target_ttft_ms=options.target_ttft_ms,
            max_waiting=len(workload.rows), enforce_eager=False,
        )  # fmt: skip
        for rate in rates or (None,):
            arrivals_s = workload.poisson_s(rate, config.seed) if rate is not None else (0.0,) * len(workload.rows)
            simulation = Simulation(config, table, truth, workload, arrivals_s)
            simulation.run()
            if rate is not None:
                for lines, mean_ms in zip((latency, ttft), simulation.report_latency(mode.name, rate), strict=True):
                    lines[mode.name].append((rate, mean_ms))
            else:
                simulation.report(mode.name)
    if options.plot:
        draw(latency, ttft, options.plot)


if __name__ == "__main__":
    main()
