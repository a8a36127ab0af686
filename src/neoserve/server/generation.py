"""What both completion endpoints share: run a stream, in one answer or in chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from neoserve.core.errors import NeoError
from neoserve.engine.outputs import Delta, RequestOutput
from neoserve.engine.remote import Stream
from neoserve.server.errors import error_response, status_of
from neoserve.server.metrics import Recorder
from neoserve.server.responses import Usage
from neoserve.server.sse import DONE, EventStream, event, json_response

T = TypeVar("T")
_CLIENT_CLOSED_REQUEST = 499


class AnswerFormat(ABC):
    """Shapes one request's answer; the two endpoints differ in nothing else."""

    def __init__(self, kind: str, model: str) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> msgspec.Struct:
        """The answer to a request that was not streamed."""

    @abstractmethod
    def chunk(self, position: int, delta: Delta) -> msgspec.Struct | None:
        """What is new, or `None` when there is nothing to show yet. position: of the prompt in the request."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last chunk of a stream with `include_usage`."""

    def num_generated(self, delta: Delta) -> int:
        """Tokens of `delta` that count as generated."""
        return len(delta.token_ids)


def respond_in_chunks(stream: Stream, answer: AnswerFormat, recorder: Recorder, *, include_usage: bool) -> EventStream:
    """Server-sent events, ending in `[DONE]`. A client that goes away ends the generation."""

    def close() -> None:
        stream.close()
        recorder.close()

    return EventStream(_events(stream, answer, recorder, include_usage), close)


async def _events(
    stream: Stream, answer: AnswerFormat, recorder: Recorder, include_usage: bool
) -> AsyncIterator[bytes]:
    num_generated = 0
    try:
        async for position, delta in stream:
            recorder.add(position, delta)
            num_generated += answer.num_generated(delta)
            chunk = answer.chunk(position, delta)
            if chunk is not None:
                yield event(chunk)
        if include_usage:
            yield event(answer.usage_chunk(_usage(stream, num_generated)))
    except NeoError as error:
        yield event(error_response(error, status_of(error)))
    yield DONE


async def respond_whole(request: Request, stream: Stream, answer: AnswerFormat, recorder: Recorder) -> Response:
    """One JSON answer when everything is generated. A client that goes away ends the generation."""
    try:
        done = await _unless_disconnected(request, _collect(stream, answer, recorder))
    finally:
        stream.close()
        recorder.close()
    if done is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    outputs, num_generated = done
    return json_response(answer.whole(outputs, _usage(stream, num_generated)))


async def _collect(stream: Stream, answer: AnswerFormat, recorder: Recorder) -> tuple[list[RequestOutput], int]:
    outputs = [submission.empty_output() for submission in stream.submissions]
    num_generated = 0
    async for position, delta in stream:
        recorder.add(position, delta)
        num_generated += answer.num_generated(delta)
        outputs[position].add(delta)
    return outputs, num_generated


async def _unless_disconnected(request: Request, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`, or `None` when the client went away first; `work` is cancelled then."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, NeoError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(stream: Stream, num_generated: int) -> Usage:
    num_prompt = sum(len(submission.prompt_token_ids) for submission in stream.submissions)
    return Usage(num_prompt, num_generated, num_prompt + num_generated)
