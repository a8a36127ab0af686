"""Events of a CUDA stream: work between two of them, and points in it for who watches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neoserve.device.base import Mark


class Submitted:
    """Work on a stream, between two events; its own `Completion`. What is not timed costs less, and has no start."""

    def __init__(self, *, timed: bool) -> None:
        self.start = torch.cuda.Event(enable_timing=True) if timed else None
        self.end = torch.cuda.Event(enable_timing=timed, blocking=True)
        self.error: Exception | None = None

    def wait(self) -> None:
        self.end.synchronize()
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return bool(self.end.query())

    def elapsed_us(self) -> float:
        assert self.start is not None, "only what `submit` began is timed"
        return float(self.start.elapsed_time(self.end)) * 1e3


@dataclass(frozen=True, slots=True)
class EventMark(Mark):
    """An event that takes the time."""

    event: torch.cuda.Event

    @classmethod
    def on(cls, stream: torch.cuda.Stream) -> EventMark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return cls(event)
