"""Errors in OpenAI's form, with the status that each kind has."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from neoserve.core.errors import EngineDeadError, InvalidRequestError, NeoError, QueueFullError
from neoserve.server.responses import ErrorBody, ErrorResponse
from neoserve.server.sse import json_response

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served; HTTP 404."""


def status_of(error: NeoError) -> int:
    """The HTTP status that `error` is answered with."""
    match error:
        case UnknownModelError():
            return 404
        case InvalidRequestError():
            return 400
        case QueueFullError():
            return 429
        case EngineDeadError():
            return 503
    return 500


def error_response(error: NeoError, status: int) -> ErrorResponse:
    """`error` in OpenAI's form."""
    param = error.param if isinstance(error, InvalidRequestError) else None
    return error_form(str(error), status, param)


def error_form(message: str, status: int, param: str | None = None) -> ErrorResponse:
    """An error in OpenAI's form."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return ErrorResponse(ErrorBody(message, kind, param, code))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    async def neo_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, NeoError)
        status = status_of(error)
        headers = {}
        if isinstance(error, QueueFullError):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        return json_response(error_response(error, status), status, headers)

    async def validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe_validation(error.errors()[0])
        return json_response(error_form(message, 400, param), 400)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return json_response(
            error_form(str(error.detail), error.status_code), error.status_code, dict(error.headers or {})
        )

    async def other_error(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return json_response(error_form("the server failed; its log says why", 500), 500)

    app.add_exception_handler(NeoError, neo_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, other_error)


def describe_validation(error: dict[str, Any]) -> tuple[str, str | None]:
    """Message and field of one of pydantic's errors."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        return str(cause), cause.param
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}", None
    path = [str(part) for part in error["loc"] if part != "body"]
    if not path:
        return f"the body is not a request: {error['msg']}", None
    if error["type"] == "missing":
        return f"{'.'.join(path)} is missing", path[0]
    return f"{'.'.join(path)}: {error['msg'][0].lower()}{error['msg'][1:]}", path[0]
