"""Workloads: how long the prompts and answers of a benchmark are, and when its requests arrive."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from neoserve.core.errors import ConfigError
from neoserve.core.request import Request, SamplingParams

_CSV_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_JSON_FIELDS = ("prompt", "max_tokens")


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request: tokens of its prompt and of its answer. recorded_s: its arrival in the trace, 0 without one."""

    num_prompt_tokens: int
    num_output_tokens: int
    recorded_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """A workload as it was asked for: synthetic lengths, or those of a file.

    Lengths are uniform and independent within `range_ratio` of input_len and output_len. limit: rows taken from the
    file. max_context: longer prompts are cut to it.
    """

    num_prompts: int = 100
    input_len: int = 1000
    output_len: int = 100
    range_ratio: float = 0.1
    lengths: Path | None = None
    limit: int | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "limit", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of a workload is {value}; expected at least 1")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio of a workload is {self.range_ratio}; expected at least 0, less than 1")

    @property
    def name(self) -> str:
        """What tells the workload from others, as `parse` reads it."""
        if self.lengths is None:
            return f"in={self.input_len},out={self.output_len},n={self.num_prompts}"
        return f"lengths={self.lengths.name}" + (f",limit={self.limit}" if self.limit else "")

    def parse(self, text: str) -> WorkloadSpec:
        """This workload with the changes of a text such as "in=1000,out=100,n=60" or "lengths=FILE,limit=80"."""
        keys = {"in": "input_len", "out": "output_len", "n": "num_prompts", "ratio": "range_ratio",
                "lengths": "lengths", "limit": "limit", "cut": "max_context"}  # fmt: skip
        changes: dict[str, int | float | Path] = {}
        for item in text.split(","):
            key, _, value = item.partition("=")
            if key not in keys or not value:
                raise ConfigError(f"--workload has {item!r}; expected KEY=VALUE with one of {', '.join(keys)}")
            kind = {"ratio": float, "lengths": Path}.get(key, int)
            try:
                changes[keys[key]] = kind(value)
            except ValueError:
                raise ConfigError(f"--workload has {item!r}; expected a number after {key}=") from None
        return replace(self, **changes)  # type: ignore[arg-type]

    def load(self, seed: int) -> Workload:
        """The requests' lengths, the same for the same seed. Raises `ConfigError` when the file cannot be used."""
        if self.lengths is None:
            return Workload(self.name, tuple(self._draw(np.random.default_rng(seed))))
        rows = list(_read(self.lengths))[: self.limit]
        if not rows:
            raise ConfigError(f"{self.lengths} has no rows")
        most = self.max_context
        if most is not None:
            rows = [replace(row, num_prompt_tokens=min(row.num_prompt_tokens, most)) for row in rows]
        return Workload(self.name, tuple(rows))

    def _draw(self, random: np.random.Generator) -> Iterator[Lengths]:
        def around(length: int) -> int:
            lowest, highest = (round(length * (1 + sign * self.range_ratio)) for sign in (-1, 1))
            return max(1, int(random.integers(lowest, highest + 1)))

        for _ in range(self.num_prompts):
            yield Lengths(around(self.input_len), around(self.output_len))


@dataclass(frozen=True, slots=True)
class Workload:
    """The lengths of all requests, in order of arrival."""

    name: str
    rows: tuple[Lengths, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        return max(row.num_prompt_tokens + row.num_output_tokens for row in self.rows)

    def requests(self, vocab_size: int, seed: int, prefix: str) -> list[Request]:
        """Prompts of random ids, answered greedily to their full length. prefix: of the request ids."""
        random = np.random.default_rng(seed)
        return [
            Request(
                request_id=f"{prefix}{index}",
                prompt_token_ids=tuple(random.integers(0, vocab_size, row.num_prompt_tokens).tolist()),
                params=SamplingParams(temperature=0, max_tokens=row.num_output_tokens, ignore_eos=True),
                stop_ids=(),
                arrival_s=0.0,
            )
            for index, row in enumerate(self.rows)
        ]

    def warm_up(self, num_prompts: int, num_output_tokens: int) -> Workload:
        """A few of the requests, with short answers."""
        rows = [
            replace(row, num_output_tokens=min(row.num_output_tokens, num_output_tokens))
            for row in self.rows[:num_prompts]
        ]
        return Workload(self.name, tuple(rows))

    def poisson_s(self, rate: float, seed: int) -> tuple[float, ...]:
        """Arrivals at random, independent of each other, `rate` a second on average; the first at 0."""
        gaps = np.random.default_rng(seed).exponential(1 / rate, len(self.rows))
        return tuple((np.cumsum(gaps) - gaps[0]).tolist())

    def recorded_s(self, rate: float | None) -> tuple[float, ...]:
        """Arrivals as recorded, the first at 0; with `rate`, stretched evenly to that many a second on average."""
        first_s, last_s = self.rows[0].recorded_s, self.rows[-1].recorded_s
        if last_s <= first_s:
            raise ConfigError(f"workload {self.name} has no arrival times; use --arrivals poisson")
        stretch = 1.0 if rate is None else (len(self.rows) - 1) / rate / (last_s - first_s)
        return tuple((row.recorded_s - first_s) * stretch for row in self.rows)


def _read(path: Path) -> Iterator[Lengths]:
    """The rows of a JSON list of {"prompt": n, "max_tokens": m}, or of a CSV file with an Azure trace's columns."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--lengths: {path} cannot be read: {error}") from None
    try:
        yield from _csv_rows(text) if path.suffix == ".csv" else _json_rows(text)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--lengths: {path} is neither a JSON list of objects with {' and '.join(_JSON_FIELDS)} nor, as .csv, "
            f"a table with the columns {', '.join(_CSV_COLUMNS)} ({type(error).__name__}: {error})"
        ) from None


def _json_rows(text: str) -> Iterator[Lengths]:
    prompt, output = _JSON_FIELDS
    for row in json.loads(text):
        yield Lengths(max(1, int(row[prompt])), max(1, int(row[output])))


def _csv_rows(text: str) -> Iterator[Lengths]:
    time, prompt, output = _CSV_COLUMNS
    for row in csv.DictReader(text.splitlines()):
        arrival_s = datetime.fromisoformat(row[time]).timestamp()
        yield Lengths(max(1, int(row[prompt])), max(1, int(row[output])), arrival_s)


def parse_rates(text: str | None) -> list[float]:
    """Growing rates from "0.2,0.4", none from `None`; raises `ConfigError` for anything else."""
    try:
        rates = sorted(float(item) for item in text.split(",")) if text is not None else []
    except ValueError:
        raise ConfigError(f"--rate is {text!r}; expected requests a second, such as 2 or 0.2,0.4,0.8") from None
    if rates and not 0 < rates[0] <= rates[-1] < float("inf"):
        raise ConfigError(f"--rate is {text!r}; expected figures above 0")
    return rates
