"""`neo bench attention`: decode attention on the CPU against the read bandwidth of the same threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from neoserve.cli.attention_measurement import AttentionBench, Case, HeadShape, Measurement
from neoserve.cli.attention_report import Report, command_line, markdown, plot, write_json
from neoserve.core.config import DType
from neoserve.core.errors import ConfigError

PRESETS = {
    shape.name: shape
    for shape in (
        HeadShape("llama-2-7b", 32, 32, 128),
        HeadShape("llama-3-8b", 32, 8, 128),
        HeadShape("llama-3-70b", 64, 8, 128),
        HeadShape("qwen2.5-7b", 28, 4, 128),
    )
}


def attention(
    preset: Annotated[str, typer.Option(help=f"Models, of {', '.join(PRESETS)}.")] = ",".join(PRESETS),
    query_heads: Annotated[int | None, typer.Option(help="With the next two: these heads instead of presets.")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences.")] = "8,32,128",
    lengths: Annotated[str, typer.Option(help="Tokens of each sequence.")] = "128,256,1024,4096",
    shapes: Annotated[
        str | None, typer.Option(help="Such as 8x128,1x32768: these instead of all pairs of --batch and --lengths.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the KV: bfloat16, float16 or float32.")] = "bfloat16",
    block_size: Annotated[int, typer.Option(help="Tokens in a block: 16 or 32.")] = 16,
    threads: Annotated[int | None, typer.Option(help="Worker threads; default: one for each CPU.")] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction sets; default: the best that runs here.")] = None,
    kv_gib: Annotated[float, typer.Option(help="Size of the KV that block tables are spread over.")] = 4.0,
    torch: Annotated[bool, typer.Option("--torch", help="Time torch on contiguous KV, too.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Draw GB/s against length into this PNG.")] = None,
) -> None:
    """Time decode attention on the CPU, against how fast the same threads read memory, and check it against float64.

    Lists are separated by commas. Cases whose KV exceeds --kv-gib are left out.
    """
    from neoserve._native import allowed_cpus, default_instruction_set

    if dtype not in get_args(DType):
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(get_args(DType))}")
    cpus = allowed_cpus()
    if threads is not None and not 1 <= threads <= len(cpus):
        raise ConfigError(f"--threads is {threads}; expected 1 to {len(cpus)}, the CPUs of this process")
    sizes = list(_sizes(shapes, batch, lengths))
    instruction_sets = isa.split(",") if isa else [default_instruction_set()]
    measurements: list[Measurement] = []
    with AttentionBench(cpus[:threads], int(kv_gib * 2**30)) as bench:
        for name, heads in product(instruction_sets, _head_shapes(preset, query_heads, kv_heads, head_dim)):
            print(f"{heads.name} {name} ...", file=sys.stderr)
            cases = (Case(heads, cast(DType, dtype), block_size, *size, name) for size in sizes)
            with_torch = torch and name == instruction_sets[0]
            measurements += [bench.measure(case, with_torch=with_torch) for case in cases if bench.fits(case)]
    if not measurements:
        raise ConfigError(f"no case's KV fits into --kv-gib {kv_gib:g}; choose a larger one, or smaller --shapes")
    report = Report(command_line(), threads or len(cpus), kv_gib, tuple(measurements))
    print(markdown(report))
    if json:
        write_json(report, json)
    if plot_to:
        plot(report, plot_to)


def _sizes(shapes: str | None, batch: str, lengths: str) -> Iterator[tuple[int, int]]:
    """(sequences, tokens of each)."""
    if shapes is None:
        for length, sequences in product(_numbers("--lengths", lengths), _numbers("--batch", batch)):
            yield sequences, length
        return
    for shape in shapes.split(","):
        size = _numbers("--shapes", shape.replace("x", ","))
        if len(size) != 2:
            raise ConfigError(f"--shapes has {shape!r}; expected sequences x tokens, such as 8x128")
        yield size[0], size[1]


def _head_shapes(
    preset: str, query_heads: int | None, kv_heads: int | None, head_dim: int | None
) -> Iterator[HeadShape]:
    free = (query_heads, kv_heads, head_dim)
    if query_heads is not None and kv_heads is not None and head_dim is not None:
        yield HeadShape("/".join(map(str, free)), query_heads, kv_heads, head_dim)
        return
    if free != (None, None, None):
        raise ConfigError("--query-heads, --kv-heads and --head-dim go together; some of them are missing")
    for name in preset.split(","):
        if name not in PRESETS:
            raise ConfigError(f"--preset is {name!r}; expected one of {', '.join(PRESETS)}")
        yield PRESETS[name]


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{flag} is {text!r}; expected whole numbers from 1 up, separated by commas")
    return numbers
