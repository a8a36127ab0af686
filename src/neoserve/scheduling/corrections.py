"""What is learned of costs from what things really took."""

from __future__ import annotations

_WEIGHT = 0.1  # of a new observation


class Correction:
    """A factor that follows what was measured over what the table said."""

    _STEP = 1.5  # an observation counts as at most this far from the present factor: outliers are rare and huge
    _RANGE = 4.0  # factors stay within 1/4 .. 4, so that no kind of iteration is ever given up for good

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, ratio: float) -> None:
        """One measured time over the table's."""
        old = self.factor
        seen = min(max(ratio, old / self._STEP), old * self._STEP)
        self.factor = min(max(old * (seen / old) ** _WEIGHT, 1 / self._RANGE), self._RANGE)


class Slowdown:
    """A factor on iterations of every kind, which follows what was measured lately and else goes back to 1.

    A machine that is shared may be slow for seconds. That it was says nothing of a kind of iteration, but would be
    learned as one's correction by whichever kind ran then; and kinds that then seem too dear do not run, so that
    nothing corrects them.
    """

    _WEIGHT = 0.3  # of a new observation: this goes first, corrections learn from what it leaves
    _STAYS = 0.9  # of it, from one observation to the next: what lasts becomes a correction
    _STEP = 1.5  # an observation counts as at most this far from what was predicted

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, ratio: float) -> None:
        """One measured time over the predicted one."""
        seen = min(max(ratio, 1 / self._STEP), self._STEP)
        self.factor = (self.factor * seen**self._WEIGHT) ** self._STAYS


class Surcharge:
    """A time that follows what was measured beyond what is known of it, from zero."""

    _STEP_US = 1000.0  # an observation counts as at most this far from the present time: now and then it is huge

    def __init__(self) -> None:
        self.us = 0.0

    def observe(self, us: float) -> None:
        """One measured time."""
        self.us = max(0.0, self.us + _WEIGHT * min(max(us - self.us, -self._STEP_US), self._STEP_US))


class PoolCorrection:
    """What a task of the worker pool takes: a time, the table's at first, and a factor on what the table says of its
    attention.

    An observation does not tell which of them is wrong. Both move, by as little as explains it (Kaczmarz's method):
    the time if the attention is short, the factor if it is long. A late worker delays a task of two rows as long as
    one of eighty; as a factor, what it costs two would make eighty seem not worth having.
    """

    _STEP = 1.5  # an observation counts as at most this far from what was predicted,
    _STEP_US = 250.0  # or, of a short task, so much longer
    _RANGE = 4.0  # but not this far; and the factor stays within 1/4 .. 4
    _EVEN_US = 1000.0  # attention of a task that moves both alike

    def __init__(self, task_us: float) -> None:
        self.task_us = task_us
        self.factor = 1.0

    def predict_us(self, attention_us: float) -> float:
        """A task with so much attention by the table."""
        return self.task_us + self.factor * attention_us

    def observe(self, attention_us: float, measured_us: float) -> None:
        """A task, or the mean of some, with so much attention by the table, and what it took."""
        predicted_us = self.predict_us(attention_us)
        most_us = max(self._STEP * predicted_us, min(predicted_us + self._STEP_US, self._RANGE * predicted_us))
        seen_us = min(max(measured_us, predicted_us / self._STEP), most_us)
        moved_us = _WEIGHT * (seen_us - predicted_us)
        before_us = self.task_us
        share = self._EVEN_US**2 / (self._EVEN_US**2 + attention_us**2)
        self.task_us = max(0.0, before_us + share * moved_us)
        if attention_us:
            factor = self.factor + (moved_us - (self.task_us - before_us)) / attention_us
            self.factor = min(max(factor, 1 / self._RANGE), self._RANGE)
