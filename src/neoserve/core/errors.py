"""Every error that NEO raises on purpose.

    NeoError
    ├── ConfigError               what was asked for cannot run; exit code 2, before anything is served
    │   ├── UnsupportedModelError   the checkpoint needs something NEO does not do
    │   ├── CheckpointError         the checkpoint's files are missing or do not fit together
    │   └── HostMemoryError         the system does not give, or does not pin, the host tier's memory
    ├── InvalidRequestError       the request is wrong; HTTP 400
    │   └── RequestTooLongError     the request can never fit in the KV pools or the context
    ├── QueueFullError            too many requests are waiting; HTTP 429
    ├── HostAttentionError        a worker failed, died or missed its deadline; the iteration failed
    └── EngineDeadError           the engine process is gone; HTTP 503

Each message says what came, what was expected and what to do.
"""


class NeoError(Exception):
    """Base of every error that NEO raises on purpose."""


class ConfigError(NeoError, ValueError):
    """What was asked for cannot run."""


class UnsupportedModelError(ConfigError):
    """The checkpoint needs an architecture or a format that NEO does not support."""


class CheckpointError(ConfigError):
    """The checkpoint's files are missing, damaged or do not fit its config."""


class HostMemoryError(ConfigError):
    """The system does not give, or does not pin, as much memory as the host tier asks for."""


class InvalidRequestError(NeoError, ValueError):
    """A request has a wrong value. `param` names the field, as in OpenAI's error objects."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLongError(InvalidRequestError):
    """A request can never fit in the context length or in the KV pools."""


class QueueFullError(NeoError):
    """Too many requests are waiting. `retry_after_s` is a hint for the client."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HostAttentionError(NeoError, RuntimeError):
    """A worker of the host tier failed, died or missed its deadline."""


class EngineDeadError(NeoError, RuntimeError):
    """The engine is gone; nothing submitted to it will be answered."""
