"""The engine's flags, one for each field of `EngineConfig`, defined once for every command that loads a model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_type_hints

import typer

from neoserve.core.config import EngineConfig, parse_bytes

# What each flag means. The order here is the order in --help.
HELP: dict[str, str] = {
    "tokenizer": "Directory or hub name of the tokenizer, when it does not lie with the model.",
    "revision": "Branch, tag or commit of a model from the hub.",
    "trust_remote_code": "Run Python code that comes with the tokenizer.",
    "load_format": "'dummy' takes random weights and needs no weight files.",
    "dtype": "Type of weights, activations and KV; 'auto' takes the checkpoint's.",
    "seed": "Seed of requests that bring none.",
    "device": "'auto' takes the GPU when there is one, else 'reference', this machine's CPU.",
    "max_model_len": "Longest context, prompt and answer together; default: the model's.",
    "max_num_seqs": "Sequences that are generated at the same time, at most.",
    "max_num_batched_tokens": "Prompt tokens of one iteration, at most; longer prompts are cut into chunks.",
    "gpu_memory_utilization": "Share of the GPU's memory that NEO may use.",
    "block_size": "Tokens in a block of KV: 16 or 32.",
    "enforce_eager": "Do not capture CUDA graphs.",
    "offload": "'auto' decodes on the host tier when that pays, 'all' decodes everything there, 'off' nothing.",
    "device_kv_tokens": "Size of the device pool in tokens; default: what memory allows.",
    "host_memory_bytes": "Size of the host pool, e.g. 64GiB; 0 for none; default: 70 % of what is free, on the "
    "reference device 25 %.",
    "host_threads": "Threads that attend on the CPU; default: the cores, less what the engine needs.",
    "host_deadline_s": "Seconds after which one hand-off to the CPU counts as failed.",
    "target_tpot_ms": "Time per output token that the scheduler must keep; default: it maximises throughput.",
    "target_ttft_ms": "Time that prompts may take when they are spread over several iterations.",
    "max_waiting": "Requests that may wait for admission; more are refused with status 429.",
}
FLAGS: dict[str, str] = {"host_memory_bytes": "--host-memory"}
_TIERS = frozenset(name for name in HELP if name.startswith(("offload", "device_kv", "host_", "target_")))

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Checkpoint directory or hub name; default: the embedded checkpoint."),
]


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the argument MODEL and a flag for each field of `EngineConfig`, in place of its `config`.

    `command` takes `config: EngineConfig` first, then its own parameters as typer reads them.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        config = EngineConfig(**{name: values.pop(name) for name in ("model", *HELP)})
        command(config, **values)

    parameters = [
        _parameter("model", Model, None),
        *(_parameter(item.name, item.annotation, item.default) for item in own),
    ]
    parameters += map(_engine_parameter, HELP)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _engine_parameter(name: str) -> inspect.Parameter:
    field = next(field for field in dataclasses.fields(EngineConfig) if field.name == name)
    kind: Any = get_type_hints(EngineConfig)[name]
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    option: dict[str, Any] = {"help": HELP[name], "rich_help_panel": "Tiers" if name in _TIERS else "Engine"}
    if name == "host_memory_bytes":
        kind, option["parser"], option["metavar"] = int | None, parse_bytes, "SIZE"
    elif type(None) in get_args(kind):
        option["show_default"] = False
    return _parameter(name, Annotated[kind, typer.Option(flag, **option)], field.default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
