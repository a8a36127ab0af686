"""Enqueue a program: the one place where stages become work on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from neoserve.core.program import Op, Stage
from neoserve.execution.graphs import LapGraphs
from neoserve.execution.lap import Lap

OnStage = Callable[[Stage | None], None]
"""Told of each stage on the stream, before its work, and with `None` once there is no more."""


def arm(stages: Iterable[Stage], laps: Mapping[int, Lap]) -> None:
    """Queue every SEND of the program for the workers, in its order; before `issue`, by the caller."""
    for stage in stages:
        if stage.op is Op.SEND:
            laps[stage.sub_batch].arm(stage.layer)


def issue(stages: Iterable[Stage], laps: Mapping[int, Lap], on_stage: OnStage | None = None) -> None:
    """Enqueue the stages in order. `laps` maps a sub-batch's index to its lap in flight. Runs on the stream."""
    for stage in stages:
        if on_stage is not None:
            on_stage(stage)
        lap = laps[stage.sub_batch]
        match stage.op:
            case Op.EMBED:
                lap.embed()
            case Op.PRE:
                lap.pre(stage.layer)
            case Op.SEND:
                lap.send()
            case Op.ATTEND:
                lap.attend(stage.layer)
            case Op.RECV:
                lap.recv()
            case Op.POST:
                lap.post(stage.layer)
            case Op.HEAD:
                lap.head()
    if on_stage is not None:
        on_stage(None)


def replay(lap: Lap, recording: LapGraphs, num_layers: int, on_stage: OnStage | None = None) -> None:
    """As `issue`, a whole lap by its recording, and HEAD; EMBED is all that the hook is told of the recording."""
    if on_stage is not None:
        on_stage(Stage(Op.EMBED, 0, lap.sub_batch.index))
    lap.replay(recording)
    if on_stage is not None:
        on_stage(Stage(Op.HEAD, num_layers - 1, lap.sub_batch.index))
    lap.head()
    if on_stage is not None:
        on_stage(None)
