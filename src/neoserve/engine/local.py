"""An engine in the caller's process, run by the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from neoserve.core.config import EngineConfig
from neoserve.core.errors import QueueFullError
from neoserve.core.stats import EngineStats
from neoserve.engine.client import EngineClient, load_codec
from neoserve.engine.core import EngineCore
from neoserve.engine.intake import Submission
from neoserve.engine.outputs import Delta, RequestOutput


def _quiet(_: str) -> None:
    """Show no progress."""


class LocalEngine(EngineClient):
    """An `EngineCore` and its text side. Works only while `run` is being iterated; one caller at a time."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] = _quiet) -> None:
        """Load the model; raises `ConfigError` when `config` cannot run."""
        self._core = EngineCore(config, progress)
        super().__init__(self._core.info, load_codec(config, self._core.info))

    def run(self, submissions: Iterable[Submission]) -> Iterator[tuple[Submission, Delta]]:
        """Generate for all of `submissions`, yielding deltas as they come; closing the iterator aborts the rest.

        More submissions than the engine's queue takes wait here. Raises `RequestTooLongError` for one that can
        never fit, which aborts the others.
        """
        waiting = deque(submissions)
        running: list[Submission] = []
        ready: list[tuple[Submission, Delta]] = []
        try:
            while True:
                while waiting and self._add(waiting[0], ready):
                    running.append(waiting.popleft())
                if not len(self._router):
                    return
                self._abort(self._router.route(self._core.step()))
                yield from ready
                ready.clear()
        finally:
            for submission in running:
                self._abort(self._router.close(submission))
            while self._core.has_work:
                self._core.step()

    def outputs(self, submissions: Iterable[Submission]) -> Iterator[RequestOutput]:
        """Generate for all of `submissions`, yielding each one's output when it is finished."""
        unfinished: dict[str, RequestOutput] = {}
        for submission, delta in self.run(submissions):
            output = unfinished.get(submission.request_id)
            if output is None:
                output = unfinished[submission.request_id] = submission.empty_output()
            output.add(delta)
            if output.finished:
                yield unfinished.pop(submission.request_id)

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine."""
        return self._core.stats()

    def check_integrity(self) -> None:
        """Assert the engine's invariants."""
        self._core.check_integrity()

    def close(self) -> None:
        """End the engine's threads and free its memory."""
        self._core.close()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add(self, submission: Submission, ready: list[tuple[Submission, Delta]]) -> bool:
        """Add all choices of `submission`; false when the queue is full for now."""
        added = []
        try:
            for request in submission.requests:
                self._core.add(request)
                added.append(request.request_id)
        except QueueFullError:
            self._abort(added)
            if not len(self._router):
                raise  # an empty engine cannot take it: waiting would not help
            return False
        self._router.open(submission, partial(_deliver, ready, submission))
        return True

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._core.abort(request_id)


def _deliver(ready: list[tuple[Submission, Delta]], submission: Submission, delta: Delta) -> None:
    ready.append((submission, delta))
