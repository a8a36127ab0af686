"""An engine in a process of its own, away from HTTP and tokenising."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from neoserve.core.config import EngineConfig
from neoserve.core.errors import EngineDeadError, HostAttentionError, NeoError
from neoserve.core.request import SamplingParams
from neoserve.core.stats import EngineInfo, EngineStats
from neoserve.engine.client import EngineClient, load_codec
from neoserve.engine.connection import EngineProcess
from neoserve.engine.intake import Prompt, Submission
from neoserve.engine.messages import (
    Abort,
    Accepted,
    Add,
    AskStats,
    Events,
    Progress,
    Ready,
    Refused,
    Start,
    StartFailed,
    Stats,
    ToEngine,
    restore,
)
from neoserve.engine.outputs import Delta
from neoserve.engine.text import TextCodec, import_tokenizers

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Stream:
    """The deltas of one or more submissions, as (position of the submission, delta), until all are finished.

    A context manager: leaving it aborts what is not finished. Iteration raises `EngineDeadError` when the engine dies
    and `HostAttentionError` when the iteration of one of the requests failed.
    """

    def __init__(self, engine: RemoteEngine, submissions: tuple[Submission, ...]) -> None:
        self.submissions = submissions
        self._engine = engine
        self._queue: asyncio.Queue[tuple[int, Delta] | NeoError] = asyncio.Queue()
        self._num_open = sum(len(submission.requests) for submission in submissions)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if self._num_open == 0:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, NeoError):
            self._num_open = 0
            raise item
        _, delta = item
        if delta.finish_reason == "error":
            self.close()
            raise HostAttentionError(delta.error or "the iteration failed")
        self._num_open -= delta.finish_reason is not None
        return item

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is not finished."""
        self._num_open = 0
        self._engine.close_stream(self)

    def deliver(self, position: int, delta: Delta) -> None:
        """Called by the engine's side for each delta."""
        self._queue.put_nowait((position, delta))

    def fail(self, error: NeoError) -> None:
        """Called by the engine's side when nothing more will come."""
        self._queue.put_nowait(error)


class RemoteEngine(EngineClient):
    """An engine process and the text side of its requests. Belongs to the event loop that started it."""

    def __init__(self, process: EngineProcess, info: EngineInfo, codec: TextCodec | None) -> None:
        """Use `RemoteEngine.start`."""
        super().__init__(info, codec)
        self._process = process
        self._text_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")
        self._tickets = itertools.count()
        self._replies: dict[int, asyncio.Future[Accepted | Refused | Stats]] = {}
        self._streams: set[Stream] = set()
        self._death: str | None = None
        self._supervisor = asyncio.create_task(self._supervise())

    @classmethod
    async def start(cls, config: EngineConfig, progress: Callable[[str], None]) -> RemoteEngine:
        """Start a process and load the model in it, calling `progress` with each step.

        Raises the `ConfigError` that the engine raised, or `EngineDeadError` when the process ends.
        """
        process = await EngineProcess.spawn()
        try:
            process.send(Start(config))
            asyncio.get_running_loop().run_in_executor(None, import_tokenizers)
            info = await _wait_ready(process, progress)
            codec = await asyncio.to_thread(load_codec, config, info)
        except BaseException:
            process.kill()
            await process.end()
            raise
        return cls(process, info, codec)

    @property
    def death(self) -> str | None:
        """Why the engine is gone; `None` while it lives."""
        return self._death

    @property
    def num_open(self) -> int:
        """Choices that are being generated or wait to be."""
        return len(self._router)

    async def in_text_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work on text that may take long, off the event loop; one at a time, as tokenizers want it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, partial(function, *args, **kwargs))

    async def prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[Submission]:
        """`Intake.prepare` for each of `prompts`."""
        base_id = request_id or uuid.uuid4().hex
        prepare = partial(self.intake.prepare, params=params, add_special_tokens=add_special_tokens)
        return [
            await self.in_text_thread(prepare, prompt, request_id=f"{base_id}-{position}")
            for position, prompt in enumerate(prompts)
        ]

    async def submit(self, submissions: Sequence[Submission]) -> Stream:
        """Send `submissions`, all or none of them, to the engine.

        Raises `RequestTooLongError`, `QueueFullError` or `EngineDeadError`.
        """
        stream = Stream(self, tuple(submissions))
        self._raise_if_dead()
        self._streams.add(stream)
        for position, submission in enumerate(submissions):
            self._router.open(submission, partial(stream.deliver, position))
        try:
            requests = tuple(request for submission in submissions for request in submission.requests)
            await self._ask(lambda ticket: Add(ticket, requests))
        except BaseException:
            stream.close()
            raise
        return stream

    async def stats(self) -> EngineStats:
        """Counters and gauges of the engine; raises `EngineDeadError`."""
        reply = await self._ask(AskStats)
        assert isinstance(reply, Stats)
        return reply.stats

    def close_stream(self, stream: Stream) -> None:
        """Abort what `stream` still generates and deliver nothing more to it."""
        self._streams.discard(stream)
        running = [request_id for submission in stream.submissions for request_id in self._router.close(submission)]
        self._abort(running)

    async def close(self) -> None:
        """End the process; open streams fail with `EngineDeadError`."""
        self._supervisor.cancel()
        self._die("the engine was closed")
        self._text_thread.shutdown(wait=False, cancel_futures=True)
        await self._process.end()

    async def _ask(self, message: Callable[[int], ToEngine]) -> Accepted | Stats:
        """Send a message and wait for its reply; raises what a `Refused` says."""
        self._raise_if_dead()
        ticket = next(self._tickets)
        reply: asyncio.Future[Accepted | Refused | Stats] = asyncio.get_running_loop().create_future()
        self._replies[ticket] = reply
        self._process.send(message(ticket))
        try:
            answer = await reply
        finally:
            self._replies.pop(ticket, None)
        if isinstance(answer, Refused):
            raise restore(answer.error)
        return answer

    def _abort(self, request_ids: Sequence[str]) -> None:
        if request_ids and self._death is None:
            self._process.send(Abort(tuple(request_ids)))

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def _supervise(self) -> None:
        """Read what the engine says until it dies; then fail everything that is open."""
        try:
            while (message := await self._process.receive_or_end()) is not None:
                self._handle(message)
            reason = f"the engine process ended with exit code {self._process.process.returncode}"
        except Exception as error:
            log.exception("the connection to the engine failed")
            reason = f"the connection to the engine failed: {error}"
        log.error("%s; requests fail until the server is started again", reason)
        self._die(reason)

    def _handle(self, message: object) -> None:
        match message:
            case Events():
                self._abort(self._router.route(message.events))
            case Accepted() | Refused() | Stats():
                reply = self._replies.get(message.ticket)
                if reply is not None and not reply.done():
                    reply.set_result(message)

    def _die(self, reason: str) -> None:
        if self._death is not None:
            return
        self._death = reason
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineDeadError(reason))
        for stream in self._streams:
            stream.fail(EngineDeadError(reason))


async def _wait_ready(process: EngineProcess, progress: Callable[[str], None]) -> EngineInfo:
    while True:
        match await process.receive_or_end():
            case Progress(text):
                progress(text)
            case Ready(info):
                return info
            case StartFailed(error):
                raise restore(error)
            case None:
                code = process.process.returncode
                raise EngineDeadError(f"the engine process ended with exit code {code} while it started")
