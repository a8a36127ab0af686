"""Laps and iterations between their planning and their commit."""

from __future__ import annotations

from dataclasses import dataclass

from neoserve.core.plan import IterationPlan, SubBatch
from neoserve.core.program import Span
from neoserve.kv.manager import Residence
from neoserve.scheduling.cost import Price
from neoserve.scheduling.load import Load
from neoserve.scheduling.sequence import Sequence


class Lap:
    """A lap from its beginning until everything planned of it is committed.

    sequences, epochs: of each `Rows`, in order. next_step: the first step that is not planned yet.
    open_iterations: planned iterations with steps of it that are not committed. lost: one of them failed.
    """

    __slots__ = ("epochs", "has_host", "lost", "next_step", "open_iterations", "sequences", "sub_batch")

    def __init__(self, sub_batch: SubBatch, sequences: list[Sequence]) -> None:
        self.sub_batch = sub_batch
        self.sequences = sequences
        self.epochs = [sequence.epoch for sequence in sequences]
        self.has_host = bool(sub_batch.host_decode)
        self.next_step = 0
        self.open_iterations = 0
        self.lost = False

    @property
    def load(self) -> Load:
        return Load.of(self.sub_batch)

    def advance(self, num_steps: int) -> Span:
        """Plan the next steps."""
        span = Span(self.sub_batch.index, self.next_step, self.next_step + num_steps, self.has_host)
        self.next_step += num_steps
        self.open_iterations += 1
        return span


@dataclass(frozen=True, slots=True)
class Departure:
    """A migration that is planned: the blocks that the sequence leaves once it is committed."""

    sequence: Sequence
    residence: Residence


@dataclass(frozen=True, slots=True)
class OpenIteration:
    """A planned iteration that is not committed. laps: those that it advances."""

    plan: IterationPlan
    laps: tuple[Lap, ...]
    departures: tuple[Departure, ...]
    price: Price | None
