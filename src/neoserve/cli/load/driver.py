"""Put requests into an engine when they are due, and note when each of their tokens came."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from neoserve.core.request import FinishReason, Request
from neoserve.core.stats import EngineStats
from neoserve.engine.core import EngineCore

_NAP_S = 0.0005  # between looks at the clock while nothing runs and the next request is not due


@dataclass(slots=True)
class Answer:
    """What became of one request. Times in seconds since the run began; a token's is when its iteration was known."""

    due_s: float
    num_prompt_tokens: int
    token_s: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def completed(self) -> bool:
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True)
class Drive:
    """A run: its answers in order of arrival, how long it took, and the engine's counters before and after."""

    answers: tuple[Answer, ...]
    duration_s: float
    before: EngineStats
    after: EngineStats


def drive(
    core: EngineCore, requests: Sequence[Request], due_s: Sequence[float], time_limit_s: float | None = None
) -> Drive:
    """Run `requests`, each submitted when it is due, to their end, or until the time is over; the rest is aborted.

    Raises `RequestTooLongError` for a request that can never fit; nothing is left in the engine then.
    """
    answers = {
        request.request_id: Answer(due, len(request.prompt_token_ids))
        for request, due in zip(requests, due_s, strict=True)
    }
    before = core.stats()
    start_s = time.perf_counter()
    coming = deque(zip(due_s, requests, strict=True))
    now_s = 0.0
    try:
        while (coming or core.has_work) and (time_limit_s is None or now_s < time_limit_s):
            while coming and coming[0][0] <= now_s:
                due, request = coming.popleft()
                core.add(replace(request, arrival_s=start_s + due))
            if core.has_work:
                _step(core, answers, start_s)
            elif coming:
                time.sleep(min(_NAP_S, max(0.0, coming[0][0] - now_s)))
            now_s = time.perf_counter() - start_s
        duration_s, after = now_s, core.stats()
    finally:
        _drain(core, answers)
    return Drive(tuple(answers.values()), duration_s, before, after)


def _step(core: EngineCore, answers: dict[str, Answer], start_s: float) -> None:
    events = core.step()
    now_s = time.perf_counter() - start_s
    for event in events:
        answer = answers[event.request_id]
        answer.token_s.extend([now_s] * len(event.token_ids))
        answer.finish_reason = event.finish_reason or answer.finish_reason


def _drain(core: EngineCore, answers: dict[str, Answer]) -> None:
    """Leave nothing in the engine."""
    for request_id, answer in answers.items():
        if answer.finish_reason is None:
            core.abort(request_id)
    while core.has_work:
        core.step()
