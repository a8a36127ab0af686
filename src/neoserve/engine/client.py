"""The boundary between front ends and an engine.

EngineClient              what a front end knows of an engine: facts, tokenizer, checks of requests
├── LocalEngine             in the caller's process and thread (engine/local.py): `LLM`, benchmarks
└── RemoteEngine            in a process of its own (engine/remote.py): `neo serve`, `AsyncLLM`
"""

from __future__ import annotations

from neoserve.core.config import EngineConfig
from neoserve.core.errors import InvalidRequestError
from neoserve.core.stats import EngineInfo
from neoserve.engine.intake import Intake
from neoserve.engine.routing import Router
from neoserve.engine.text import TextCodec


class EngineClient:
    """What every front end uses of an engine, wherever it runs.

    info: facts of the engine. codec: its tokenizer, `None` for a model without one. intake: checks and tokenises.
    """

    def __init__(self, info: EngineInfo, codec: TextCodec | None) -> None:
        self.info = info
        self.codec = codec
        self.intake = Intake(info, codec)
        self._router = Router(codec)

    def required_codec(self, param: str) -> TextCodec:
        """The tokenizer; raises `InvalidRequestError` for field `param` when the model has none."""
        if self.codec is None:
            raise InvalidRequestError(f"this model has no tokenizer, so {param} cannot be text", param)
        return self.codec


def load_codec(config: EngineConfig, info: EngineInfo) -> TextCodec | None:
    """The tokenizer that was asked for or that lies with the checkpoint; `None` without a checkpoint."""
    path = config.tokenizer or info.checkpoint_path
    if path is None:
        return None
    return TextCodec(path, trust_remote_code=config.trust_remote_code)
