"""Runs of the same requests in one offload mode after another, on one loaded model."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neoserve import __version__
from neoserve.cli.load.driver import drive
from neoserve.cli.load.limits import Ceilings
from neoserve.cli.load.options import LoadOptions
from neoserve.cli.load.report import figures
from neoserve.cli.load.tables import summary
from neoserve.cli.load.workload import Workload
from neoserve.core.config import EngineConfig, OffloadMode
from neoserve.core.errors import ConfigError, RequestTooLongError
from neoserve.engine.core import EngineCore
from neoserve.engine.telemetry import IterationLog, Trace
from neoserve.models.presets import PRESETS
from neoserve.models.weights import DecoderWeights

WARM_UP_TOKENS = 8
MODES: tuple[OffloadMode, ...] = ("auto", "off", "all")

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Mode:
    """An offload mode to run. device_kv_tokens: of the device pool, where it differs from the engine's flag."""

    name: str
    offload: OffloadMode
    device_kv_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Mode:
        """From "auto" or "off@14512"."""
        offload, _, tokens = text.strip().partition("@")
        for known in MODES:
            if offload == known and (not tokens or (tokens.isdecimal() and int(tokens))):
                return cls(text.strip(), known, int(tokens) if tokens else None)
        raise ConfigError(f"--compare has {text!r}; expected {', '.join(MODES)}, or one of them with @TOKENS")


@dataclass(frozen=True, slots=True)
class Case:
    """One run, the same in every mode. rate: requests a second that arrive; `None` where none was set."""

    workload: Workload
    due_s: tuple[float, ...]
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run's figures (`report.figures`)."""

    mode: Mode
    case: Case
    figures: dict[str, Any]


class Session:
    """Carries out cases, writing what is known to the JSON file after each."""

    def __init__(self, config: EngineConfig, options: LoadOptions, cases: Sequence[Case], show: Show) -> None:
        self._config = _for_cases(config, cases)
        self._options = options
        self._cases = cases
        self._show = show
        self._modes = [Mode.parse(text) for text in (options.compare or config.offload).split(",")]
        self._ceilings: Ceilings | None = None
        self._engines: dict[str, dict[str, Any]] = {}
        self.outcomes: list[Outcome] = []

    def run(self) -> list[Outcome]:
        """All cases in all modes; figures go to the JSON file and a line for each run to standard output."""
        if self._options.json_file is not None:
            self._write(self._options.json_file)  # a path that cannot be written shows before hours of runs
        weights: DecoderWeights | None = None
        for mode in self._modes:
            weights = self._run_mode(mode, weights)
            _release_memory()
        return self.outcomes

    def _run_mode(self, mode: Mode, weights: DecoderWeights | None) -> DecoderWeights:
        """All cases in one mode; returns the weights, for the next."""
        config = replace(self._config, offload=mode.offload)
        if mode.device_kv_tokens is not None:
            config = replace(config, device_kv_tokens=mode.device_kv_tokens)
        try:
            core = EngineCore(config, self._show, weights)
        except ConfigError as error:
            longest = max(case.workload.longest for case in self._cases)
            raise ConfigError(f"mode {mode.name}, for requests of up to {longest} tokens: {error}") from None
        try:
            self._show(f"{mode.name}: ready after {core.info.start_s:.1f} s; measuring the machine, warming up")
            ceilings = Ceilings.measure(core)
            # The host tier's ceiling is known once a mode has one; the device's stay what they were first.
            if self._ceilings is not None:
                ceilings = replace(self._ceilings, host_gb_per_s=ceilings.host_gb_per_s or self._ceilings.host_gb_per_s)
            self._ceilings = ceilings
            self._engines[mode.name] = _facts(core)
            self._warm_up(core)
            for case in self._cases:
                self._run_case(core, mode, case, ceilings)
            core.check_integrity()
            return core.weights
        finally:
            core.observer = None
            core.close()

    def _warm_up(self, core: EngineCore) -> None:
        workload = self._cases[0].workload.warm_up(self._options.warm_up_prompts, WARM_UP_TOKENS)
        requests = workload.requests(core.info.config.shape.vocab_size, self._config.seed, "warm-up-")
        drive(core, requests, [0.0] * len(requests))

    def _run_case(self, core: EngineCore, mode: Mode, case: Case, ceilings: Ceilings) -> None:
        config, options = core.info.config, self._options
        trace = Trace(core.device, options.trace_iterations, options.trace_skip) if options.trace else None
        log = IterationLog(config.shape.num_layers, trace)
        core.observer = log
        requests = case.workload.requests(config.shape.vocab_size, self._config.seed, f"{len(self.outcomes)}-")
        gc.collect()
        gc.freeze()  # what is there stays there, and need not be looked through during the run
        try:
            run = drive(core, requests, case.due_s, options.time_limit_s)
        except RequestTooLongError as error:
            raise ConfigError(f"workload {case.workload.name} does not fit mode {mode.name}: {error}") from None
        finally:
            gc.unfreeze()
        outcome = Outcome(mode, case, figures(run, log.iterations, config, ceilings))
        self.outcomes.append(outcome)
        print(summary(outcome), flush=True)
        if options.json_file is not None:
            self._write(options.json_file)
        if trace is not None and options.trace is not None:
            self._write_trace(trace, options.trace, core, outcome)

    def _write_trace(self, trace: Trace, path: Path, core: EngineCore, outcome: Outcome) -> None:
        if len(self._modes) * len(self._cases) > 1:
            path = path.with_stem(f"{path.stem}-{len(self.outcomes)}")
        facts = {
            "model": core.info.config.model_name,
            "device": core.device.name,
            "mode": outcome.mode.name,
            "workload": outcome.case.workload.name,
        }
        try:
            num_iterations = trace.write(path, facts)
        except OSError as error:
            raise ConfigError(f"--trace: {path} cannot be written: {error}") from None
        self._show(f"{path}: {num_iterations} iterations")

    def _write(self, path: Path) -> None:
        document = {
            "neo": __version__,
            "torch": torch.__version__,
            "model": self._config.model or "embedded",
            "engines": self._engines,
            "ceilings": asdict(self._ceilings) if self._ceilings is not None else None,
            "runs": [
                {
                    "mode": outcome.mode.name,
                    "workload": outcome.case.workload.name,
                    "rate": outcome.case.rate,
                    **outcome.figures,
                }
                for outcome in self.outcomes
            ],
        }
        try:
            path.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {path} cannot be written: {error}") from None


def _for_cases(config: EngineConfig, cases: Sequence[Case]) -> EngineConfig:
    """What the engine needs for the cases: random weights for a preset, a context and a queue that hold them."""
    if config.model in PRESETS and config.load_format == "auto":
        config = replace(config, load_format="dummy")
    if config.max_model_len is None:
        config = replace(config, max_model_len=max(case.workload.longest for case in cases))
    most = max(len(case.workload.rows) for case in cases)
    return replace(config, max_waiting=max(config.max_waiting, most))


def _facts(core: EngineCore) -> dict[str, Any]:
    config = core.info.config
    return {
        "device": core.device.name,
        "dtype": config.dtype,
        "device_kv_tokens": config.device_blocks * config.block_size,
        "host_kv_tokens": config.host_blocks * config.block_size,
        "host_threads": len(config.worker_cpus),
        "instruction_set": core.info.instruction_set,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "start_s": core.info.start_s,
    }


def _release_memory() -> None:
    """Give the pools of an engine that is closed back, so that the next one finds them free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
