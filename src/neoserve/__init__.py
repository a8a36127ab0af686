"""NEO: an LLM serving engine that keeps part of the KV cache, and its attention, on the CPU.

>>> from neoserve import LLM, SamplingParams
>>> LLM().chat([{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(temperature=0))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from neoserve.core.config import EngineConfig
from neoserve.core.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    HostAttentionError,
    HostMemoryError,
    InvalidRequestError,
    NeoError,
    QueueFullError,
    RequestTooLongError,
    UnsupportedModelError,
)
from neoserve.core.request import SamplingParams

if TYPE_CHECKING:
    from neoserve.engine.async_llm import AsyncLLM
    from neoserve.engine.llm import LLM
    from neoserve.engine.outputs import CompletionOutput, Delta, Logprob, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "EngineConfig",
    "EngineDeadError",
    "HostAttentionError",
    "HostMemoryError",
    "InvalidRequestError",
    "Logprob",
    "NeoError",
    "QueueFullError",
    "RequestOutput",
    "RequestTooLongError",
    "SamplingParams",
    "UnsupportedModelError",
    "__version__",
]

# Loaded when first used: an engine brings torch, which takes seconds that `import neoserve` need not.
_LAZY = {
    "LLM": "neoserve.engine.llm",
    "AsyncLLM": "neoserve.engine.async_llm",
    "CompletionOutput": "neoserve.engine.outputs",
    "Delta": "neoserve.engine.outputs",
    "Logprob": "neoserve.engine.outputs",
    "RequestOutput": "neoserve.engine.outputs",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
