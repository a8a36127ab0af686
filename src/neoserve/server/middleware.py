"""What every HTTP request passes before it is read: the key, and the limit on its size."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neoserve.server.errors import error_form
from neoserve.server.sse import json_response

_GUARDED = ("/v1/", "/tokenize", "/detokenize")


class ApiKeyGuard:
    """Refuses requests to the model without one of the keys; health and metrics stay open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_GUARDED) or self._knows(scope):
            await self._app(scope, receive, send)
            return
        form = error_form("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", 401)
        await json_response(form, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every key is compared, in constant time, so that the answer's timing says nothing about any of them.
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        return kind.lower() == "bearer" and any(matches)


class BodyLimit:
    """Refuses bodies past `max_bytes`, by their declared length or as soon as that much has come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = f"the body is larger than the limit of {self._max_bytes} bytes"
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await json_response(error_form(refusal, 413), 413, {"Connection": "close"})(scope, receive, send)
            return
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, refusal, {"Connection": "close"})  # the application answers with it
            return message

        await self._app(scope, limited, send)
