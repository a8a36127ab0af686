"""The scheduler's knobs, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """How eager the scheduler is. The defaults are meant for serving; tests turn single knobs.

    expected_share: how much of its remaining tokens a sequence is expected to generate: who enters a pool must fit
        beside its residents while all run that far, so that entries do not make others wait or migrate. `None`:
        learned from the sequences that ended.
    pressure_growth_tokens: in `auto`, the newest leaves the device pool when its residents could not even grow by
        this much. Who came in was expected to fit until it ends, so nothing bounces.
    max_ratio: without a target, so many host sequences are admitted that they get a token once in so many iterations.
    slowest_ratio: where host rows do not pay, a lap of theirs may take so many iterations.
    max_skipped: and it begins after at most so many iterations without host rows.
    most_forced: after so many such laps in a row, host sequences go back to the device before new requests enter it.
    min_gain: pipelining must be predicted to be this much better than device-only, and another number of host rows
        than the one that is wanted.
    entry_gain: and this much for the first request to enter the host tier, where it has to be served to its end;
        min_gain is enough for those that follow. Small gains are within what a prediction may be off: with 1.05 an 8B
        model on an H200 lost 4 percent.
    host_stretch: or in so many times that, because laps with prompts hide more than decode-only ones.
    forced_migration_period: for tests: every so many iterations the longest-settled sequence changes its tier.
    """

    expected_share: float | None = None
    pressure_growth_tokens: int = 8
    max_ratio: int = 4
    slowest_ratio: int = 16
    max_skipped: int = 16
    most_forced: int = 8
    min_gain: float = 1.02
    entry_gain: float = 1.08
    host_stretch: float = 1.5
    forced_migration_period: int | None = None
