"""What the front end and the engine process say to each other: MessagePack over one pair of sockets."""

from __future__ import annotations

import msgspec

from neoserve.core import errors
from neoserve.core.config import EngineConfig
from neoserve.core.errors import InvalidRequestError, NeoError, QueueFullError
from neoserve.core.request import Request, TokenEvent
from neoserve.core.stats import EngineInfo, EngineStats


class Start(msgspec.Struct, tag=True, frozen=True):
    """First message to the engine process: load and run this."""

    config: EngineConfig


class Add(msgspec.Struct, tag=True, frozen=True):
    """Take all of these requests or none; answered by `Accepted` or `Refused`."""

    ticket: int
    requests: tuple[Request, ...]


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Stop these requests; unknown ids are ignored."""

    request_ids: tuple[str, ...]


class AskStats(msgspec.Struct, tag=True, frozen=True):
    """Answered by `Stats`."""

    ticket: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End the process."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """A step of starting, for people to read."""

    text: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is loaded."""

    info: EngineInfo


class ErrorText(msgspec.Struct, frozen=True):
    """An error on the wire; `kind` is the name of a class of `core.errors`."""

    kind: str
    text: str
    param: str | None = None
    retry_after_s: float = 1.0


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start."""

    error: ErrorText


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """The requests of an `Add` are in the engine."""

    ticket: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """None of the requests of an `Add` is in the engine."""

    ticket: int
    error: ErrorText


class Events(msgspec.Struct, tag=True, frozen=True):
    """What one turn of the engine did."""

    events: list[TokenEvent]


class Stats(msgspec.Struct, tag=True, frozen=True):
    """The answer to `AskStats`."""

    ticket: int
    stats: EngineStats


ToEngine = Start | Add | Abort | AskStats | Stop
FromEngine = Progress | Ready | StartFailed | Accepted | Refused | Events | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """`message` as MessagePack."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """A message of the front end; raises `msgspec.ValidationError` for anything else."""
    message: ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """A message of the engine process; raises `msgspec.ValidationError` for anything else."""
    message: FromEngine = _from_engine.decode(data)
    return message


def describe(error: NeoError) -> ErrorText:
    """`error` as it goes over the wire."""
    return ErrorText(
        type(error).__name__,
        str(error),
        param=error.param if isinstance(error, InvalidRequestError) else None,
        retry_after_s=error.retry_after_s if isinstance(error, QueueFullError) else 1.0,
    )


def restore(error: ErrorText) -> NeoError:
    """The error that came over the wire."""
    kind: type[NeoError] = getattr(errors, error.kind)
    if issubclass(kind, InvalidRequestError):
        return kind(error.text, error.param)
    if issubclass(kind, QueueFullError):
        return kind(error.text, error.retry_after_s)
    return kind(error.text)
