"""JSON answers and server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def json_response(body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`body` as JSON."""
    return Response(_encode(body), status, headers, media_type="application/json")


def event(body: msgspec.Struct) -> bytes:
    """`body` as one server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events that calls `close` when it is over, also when nobody has read any of it."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
