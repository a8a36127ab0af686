"""`neo info`: what this machine offers, and what NEO would choose here."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import psutil

from neoserve.core.config import DTYPE_BYTES, EngineConfig
from neoserve.core.errors import ConfigError

Line = tuple[str, str]

_BANDWIDTH_BYTES = 2**30  # far more than the caches hold


def info(config: EngineConfig) -> None:
    """Show what this machine offers, and what NEO would choose for MODEL and the flags given."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, lines in (("Machine", _machine()), ("NEO would choose", _choices(config))):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        with console.status(f"{title.lower()} ..."):
            for name, value in lines:
                table.add_row(name, value)
        console.print(table)


def _machine() -> Iterator[Line]:
    import torch

    from neoserve import _native

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    else:
        yield "GPU", "none that torch can use"
    cpus = _native.allowed_cpus()
    yield "CPU", f"{platform.machine()}, {len(cpus)} CPUs for this process of {psutil.cpu_count()}"
    yield "instruction sets", f"{', '.join(_native.instruction_sets())}; in use: {_native.default_instruction_set()}"
    memory = psutil.virtual_memory()
    yield "host memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    for num_threads in sorted({1, len(cpus)}):
        yield f"host memory read, {num_threads} threads", f"{_read_gb_per_s(cpus[:num_threads]):.1f} GB/s"


def _read_gb_per_s(cpus: list[int]) -> float:
    from neoserve._native import WorkerPool
    from neoserve.cli.load.limits import host_read_gb_per_s

    pool = WorkerPool(cpus)
    try:
        return host_read_gb_per_s(pool, cpus, _BANDWIDTH_BYTES)
    finally:
        pool.close()


def _choices(config: EngineConfig) -> Iterator[Line]:
    from neoserve.engine.build import choose_device, choose_dtype
    from neoserve.engine.resolve import share_cpus
    from neoserve.models.checkpoint import open_checkpoint

    device = choose_device(config)
    why = "asked for" if config.device != "auto" else "a GPU is there" if device == "cuda" else "there is no GPU"
    yield "--device", f"{device} ({why})"
    threads = share_cpus(config, device, host_tier=config.offload != "off")
    if threads.worker_cpus:
        yield "--host-threads", f"{len(threads.worker_cpus)} on CPUs {', '.join(map(str, threads.worker_cpus))}"
    else:
        yield "--host-threads", "none: --offload is off"
    if device == "reference":
        beside = f", {threads.num_beside_workers} while the workers attend" if threads.worker_cpus else ""
        yield "compute threads", f"{threads.num_compute}{beside}"
    try:
        spec = open_checkpoint(config.model, config.revision, config.load_format).spec
    except ConfigError as error:
        yield "MODEL", str(error)
        return
    dtype = choose_dtype(config, spec.dtype, device)
    token_bytes = spec.shape.kv_bytes_per_token(dtype)
    yield "MODEL", config.model or "the embedded checkpoint"
    yield "--dtype", f"{dtype} ({DTYPE_BYTES[dtype]} bytes)"
    yield "--max-model-len", f"{config.max_model_len or spec.shape.max_position}"
    yield "KV of a token", f"{token_bytes} bytes: {2**30 // token_bytes} tokens a GiB"
