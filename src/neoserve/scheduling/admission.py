"""Requests that wait, and their way into the pools: first come, first served, over both tiers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import InvalidRequestError, QueueFullError
from neoserve.core.plan import Tier
from neoserve.core.request import Request
from neoserve.scheduling.candidates import Pace
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.load import Load
from neoserve.scheduling.placement import Placement
from neoserve.scheduling.sequence import Sequence
from neoserve.scheduling.split import Splitter

_FORESIGHT = 64  # waiting requests that count when judging whether host rows will pay
_HOST_JUDGEMENT_US = 2e6  # of iterations, for which that judgement holds: it takes some 10 ms
_JUDGEMENT_AGE = 8  # iterations for which all else does
_FILLED = 0.7  # of the host rows that are wanted: until there are so many, prompts come first


class Outlook(NamedTuple):
    """reference: decode load of as many of the sequences that run and wait as the device pool could hold; of those that
    run, if there is no device pool. balance: tokens of their prompts for each token that they will generate.
    """

    reference: Load
    balance: float


class Admission:
    """The queue and the slots.

    No more sequences run than an iteration has rows, so decodes never crowd each other or the oldest prompt out.
    """

    def __init__(self, config: ResolvedConfig, placement: Placement, cost: CostModel, splitter: Splitter) -> None:
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.num_slots = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.free_slots = list(range(self.num_slots - 1, -1, -1))
        self._max_rows = config.max_num_batched_tokens
        self._max_waiting = config.max_waiting
        self._only_host = config.offload == "all"
        self._placement = placement
        self._cost = cost
        self._splitter = splitter
        self._host_rows_wanted = 0
        self._elapsed_us = 0.0
        self._judged_at_us = -_HOST_JUDGEMENT_US
        self._refused = ("", -1, -1)  # head of the queue, residents that left, time: nothing new since it was refused
        self._outlook = Outlook(Load(), 0.0)
        self._looked_at = -_JUDGEMENT_AGE

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestTooLongError` or `QueueFullError`."""
        self._placement.check_fits(request)
        if request.request_id in self.waiting:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use; expected a new one", "request_id")
        if len(self.waiting) >= self._max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting, the most allowed; try again later")
        self.waiting[request.request_id] = request

    def admit(self, running: dict[str, Sequence], iteration: int, *, host_only: bool) -> Sequence | None:
        """Admit the head of the queue and add it to `running`; `None` when it has to wait.

        host_only: an older request of this iteration went to the host.
        """

        def host_pays() -> bool:
            return self._only_host or self._host_pays(running.values(), iteration)

        if not (self.waiting and self.free_slots):
            return None
        request = next(iter(self.waiting.values()))
        state = (request.request_id, self._placement.kv.num_left, iteration // _JUDGEMENT_AGE)
        if state == self._refused:
            return None
        residence = self._placement.admit(request, host_only=host_only, host_pays=host_pays)
        if residence is None:
            self._refused = state
            return None
        del self.waiting[request.request_id]
        sequence = Sequence(request, self.free_slots.pop(), residence, self._placement.max_new_tokens(request))
        running[request.request_id] = sequence
        return sequence

    def observe(self, elapsed_us: float) -> None:
        """An iteration took so long."""
        self._elapsed_us += elapsed_us

    @property
    def waits_for_device(self) -> bool:
        """Whether the head of the queue waits for room in the device pool, as host rows do not pay now."""
        if not self.waiting or self._host_rows_wanted:
            return False
        return self._placement.fits_device(next(iter(self.waiting.values())))

    def outlook(self, running: Iterable[Sequence], iteration: int) -> Outlook:
        """What is to be expected. It changes slowly and is found anew every few iterations."""
        if iteration - self._looked_at >= _JUDGEMENT_AGE:
            self._looked_at = iteration
            self._outlook = Outlook(self._reference(running), self._balance(running))
        return self._outlook

    def _reference(self, running: Iterable[Sequence]) -> Load:
        device, host = _resident_load(running)
        count, tokens = device.rows + host.rows, device.device_tokens + host.host_tokens
        if not count or self._only_host:
            return Load.device_decode(count, tokens)
        mean_tokens = tokens / count
        rows = max(1, min(int(self._placement.device_tokens / mean_tokens), count + len(self.waiting)))
        return Load.device_decode(rows, int(rows * mean_tokens))

    def pace(self, running: Iterable[Sequence], iteration: int) -> Pace:
        """Answers and prompts in balance, and up to twice as many prompt rows while there are fewer host rows than
        wanted."""
        pace = Pace(self.outlook(running, iteration).balance, is_calm=not self.waiting)
        if not self._host_rows_wanted:
            return pace
        _, host = _resident_load(running)
        share = host.rows / self._host_rows_wanted
        return pace._replace(prompt_rows=pace.prompt_rows * max(1.0, 2.0 - share), fills_host=share < _FILLED)

    def _balance(self, running: Iterable[Sequence]) -> float:
        prompts = answers = 0
        for sequence in running:
            prompts += sequence.given
            answers += sequence.max_new_tokens
        for request in islice(self.waiting.values(), _FORESIGHT):
            prompts += len(request.prompt_token_ids)
            answers += self._placement.max_new_tokens(request)
        return prompts / max(1.0, answers * self._placement.expected_share)

    def _host_pays(self, running: Iterable[Sequence], iteration: int) -> bool:
        """Whether the head of the queue should go to the host: of as many host rows as there could soon be, more would
        be worth having than there are, and those leave the worker pool time for one more."""
        device, host = _resident_load(running)
        limit_us = self._splitter.host_lap_limit_us(device)
        if self._elapsed_us - self._judged_at_us >= _HOST_JUDGEMENT_US:
            self._judged_at_us = self._elapsed_us
            future = self._future_host_load(host, limit_us)
            reference, balance = self.outlook(running, iteration)
            self._host_rows_wanted = (
                self._splitter.rows_worth_having(
                    reference, device, future, balance, self._max_rows, wanted=self._host_rows_wanted
                )
                if future.rows
                else 0
            )
        head = len(next(iter(self.waiting.values())).prompt_token_ids)
        has_time = self._cost.host_lap_us(host + Load.host_decode(1, head)) <= limit_us
        return host.rows < self._host_rows_wanted and has_time

    def _future_host_load(self, host: Load, limit_us: float) -> Load:
        """The host rows if as many waiting requests as there is time for went to the host."""
        for request in islice(self.waiting.values(), _FORESIGHT):
            more = host + Load.host_decode(1, len(request.prompt_token_ids))
            if self._cost.host_lap_us(more) > limit_us:
                break
            host = more
        return host


def _resident_load(running: Iterable[Sequence]) -> tuple[Load, Load]:
    """Decode loads of the two tiers once every admitted prompt is computed."""
    device_rows = device_tokens = host_rows = host_tokens = 0
    for sequence in running:
        if sequence.finished:
            continue
        tokens = max(sequence.computed, sequence.given)
        if sequence.residence.tier is Tier.DEVICE:
            device_rows += 1
            device_tokens += tokens
        else:
            host_rows += 1
            host_tokens += tokens
    return Load.device_decode(device_rows, device_tokens), Load.host_decode(host_rows, host_tokens)
