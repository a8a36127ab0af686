"""Which program an iteration runs: how its rows are split over the sub-batches, and how far each of them gets.

Objective. Work is counted at what it would cost device-only: a decode token is worth its share of a decode-only lap
of as many sequences as the device pool holds, a prefill row what a row costs among very many. A candidate's *rate*
is the worth of what it gets done (a host lap that gets a quarter of its way counts a quarter) over its predicted
time. Prefill rows count, because a prompt must be computed anyway, on whichever tier it ends up; host rows count as
much as device rows, because a client does not care where its token came from. With the same device rows and prompts,
a candidate beats device-only exactly if its host rows cost less extra time than device-only would need for as many
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from neoserve.core.plan import Tier
from neoserve.core.program import Span
from neoserve.scheduling.candidates import Choice, Chunk, Pace, Pricing, Work
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.load import Load
from neoserve.scheduling.policy import Policy

_RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 11)  # iterations that a host lap may take, tried in this order
_BALANCING_ROUNDS = 3  # of prompt rows, how far the host lap gets, and again
_FEWER, _MOST_NUMBERS = 0.7, 4  # numbers of host rows that are compared: each so much less than the one before
_CALM_FACTOR = 2  # of the prompt rows at the least, while no request waits to be admitted
_FEWEST_STEPS, _MOST_STEPS = 0.4, 2.5  # of a host lap in an iteration, of those with which neither side waits
_MOST_PROMPTS = 16  # beside them in an iteration: shorter prompts are priced as so many that fill it


class Splitter:
    """Prices the candidates of an iteration and takes the best.

    target_us: what the interval between two tokens of a sequence may be; `None` for throughput.
    target_ttft_us: what the prompts of an iteration may take together when they are spread over several.
    """

    def __init__(
        self,
        cost: CostModel,
        num_layers: int,
        policy: Policy,
        target_us: float | None = None,
        target_ttft_us: float | None = None,
    ) -> None:
        self._cost = cost
        self._num_steps = num_layers + 1
        self._policy = policy
        self._target_us = target_us
        self._target_ttft_us = math.inf if target_ttft_us is None else target_ttft_us
        self._ridge_rows = lru_cache(maxsize=1)(cost.ridge_rows)  # the reference load changes now and then
        self._prefill_row_us = cost.prefill_row_us()
        self._ratios = (*(ratio for ratio in _RATIOS if ratio < policy.slowest_ratio), policy.slowest_ratio)

    def choose(self, work: Work) -> Choice:
        """The best candidate; never one with host rows that is predicted worse than device-only, unless host rows
        must progress now.

        Beside decodes, prompts are computed at the pace at which sequences that end make room for them, so that
        iterations are alike: a long prefill keeps every decode waiting, and the laps after it read the weights for a
        few rows only. But no fewer rows than the ridge point of each sub-batch, twice that while no request waits to be
        admitted, and so many that all are done within their target.
        """
        pricing = self._pricing(work)
        available = self._within_target(pricing, sum(chunk.count for chunk in work.chunks))
        if not (available and (work.device.rows or work.host_tokens or work.lap)):
            return self._with_prompts(pricing, available, available)
        num_host = len(work.host_tokens) + (work.lap.host_rows if work.lap else 0)
        fewest = self._fewest_prompt_rows(work.reference, num_host) * (_CALM_FACTOR if work.pace.is_calm else 1)
        guesses = (work.reference.rows, max(work.reference.rows, work.device.rows + num_host))
        choice = max((self._in_balance(pricing, rows, fewest, available) for rows in guesses), key=_rate)
        while (rows := _prefill_rows(choice)) < available:
            if available / rows * choice.price.total_us <= self._target_ttft_us:
                break
            choice = self._with_prompts(pricing, min(available, 2 * rows), available)
        return choice

    def _in_balance(self, pricing: Pricing, decode_rows: float, fewest: int, most: int) -> Choice:
        """The candidate with as many prompt rows as keep pace with its decodes, and at least with a full device
        pool's. decode_rows: a first guess; from few, host rows go slowly and prompts with them, from many, both fast.

        Where none keeps pace, because host rows pay only beside fewer prompts than they would need, it is the last
        one tried; while the host tier fills, the one with the most prompts, and host rows run nevertheless.
        """
        work = pricing.work
        tried: list[Choice] = []
        wanted = 0
        for _ in range(_BALANCING_ROUNDS):
            before, wanted = wanted, min(most, max(fewest, round(work.pace.prompt_rows * decode_rows)))
            if tried and abs(wanted - before) <= before // 8:
                return tried[-1]
            tried.append(self._with_prompts(pricing, wanted, most))
            decode_rows = max(work.reference.rows, tried[-1].decode_rows)
        if not work.pace.fills_host:
            return tried[-1]
        most_rows = max(tried, key=_prefill_rows)
        if work.host_tokens and not any(most_rows.num_host):
            whole = self._whole_lap(pricing, _prefill_rows(most_rows), most)
            if self._meets_target(whole):
                return whole
        return most_rows

    def _with_prompts(self, pricing: Pricing, wanted: int, most: int) -> Choice:
        """The best candidate with about so many prompt rows, which fill what is recorded, and `most` of them."""
        prefill_rows = min(most, self._cost.filling(wanted, pricing.work.device.rows))
        if pricing.work.lap:
            return self._advance_lap(pricing, prefill_rows)
        if pricing.work.host_tokens:
            return self._begin_lap(pricing, prefill_rows, self._whole_lap(pricing, wanted, most))
        return pricing.price((prefill_rows, 0), 0, 0, 0)

    def rows_worth_having(
        self, reference: Load, device: Load, host: Load, balance: float, most_rows: int, *, wanted: int = 0
    ) -> int:
        """How many of these host rows generate the most tokens a second beside these device rows; 0 where that is not
        far better than device-only, or not better any more where some are `wanted` already: a few of them are worse
        than none and than many. As many as are wanted unless another number is clearly better.

        Both with `balance` prompt rows for each token, up to `most_rows` in an iteration, and without: who enters has
        to be served on when there are no more prompts. The first prompt is half computed, as on average it is where
        each takes several iterations.
        """
        tokens = host.host_tokens // host.rows
        length = max(tokens, most_rows // _MOST_PROMPTS)

        def rate(num_host: int, pace: float) -> float:
            tier, half = Tier.HOST if num_host else Tier.DEVICE, length // 2
            begun, whole = Chunk(tier, half, length - half, samples=True), Chunk(tier, 0, length, samples=True)
            prompts = (begun, *(whole,) * (most_rows // length + 1))
            work = Work(reference, device, prompts, Pace(pace), (tokens,) * num_host, None, 0, must_run_host=False)
            if not (device.rows or num_host):
                return 0.0
            pricing = self._pricing(work)
            fewest = min(most_rows, self._fewest_prompt_rows(reference, num_host)) if pace else 0
            choice = self._in_balance(pricing, device.rows + num_host, fewest, most_rows)
            return self._lasting_rate(pricing, choice, pace) if self._meets_target(choice) else 0.0

        gain = self._policy.min_gain if wanted else self._policy.entry_gain
        numbers = {math.ceil(host.rows * _FEWER**i) for i in range(_MOST_NUMBERS)}
        if 0 < wanted <= host.rows:
            numbers.add(wanted)
        rates = {number: rate(number, balance) for number in numbers}
        paying = [number for number in numbers if rates[number] > gain * rate(0, balance)]
        paying.sort(key=lambda number: rates[number] * (self._policy.min_gain if number == wanted else 1.0))
        alone = gain * rate(0, 0.0)
        return next((number for number in reversed(paying) if rate(number, 0.0) > alone), 0)

    def _lasting_rate(self, pricing: Pricing, choice: Choice, pace: float) -> float:
        """Tokens generated in a microsecond if `pace` prompt rows come with each: by iterations like this one, and in
        between by others without prompts, where its prompts allow for more tokens than it generates."""
        if not pace:
            return choice.decode_rows / choice.price.total_us
        tokens = _prefill_rows(choice) / pace
        missing = tokens - choice.decode_rows
        if missing <= 0:
            return tokens / choice.price.total_us
        between = self._with_prompts(pricing, 0, 0)
        return tokens / (choice.price.total_us + missing / between.decode_rows * between.price.total_us)

    def _fewest_prompt_rows(self, reference: Load, num_host: int) -> int:
        """The ridge point of each sub-batch."""
        return self._ridge_rows(reference) * (2 if num_host else 1)

    def host_lap_limit_us(self, device: Load) -> float:
        """How long the worker pool may take for a lap of all host sequences, for them to keep their interval."""
        if self._target_us is not None:
            return self._target_us
        return self._policy.host_stretch * self._policy.max_ratio * self._device_lap_us(device)

    def _pricing(self, work: Work) -> Pricing:
        decode_us = self._device_lap_us(work.reference) / max(1, work.reference.rows)
        return Pricing(self._cost, self._num_steps, work, decode_us, self._prefill_row_us)

    def _device_lap_us(self, device: Load) -> float:
        load = device if device.rows else Load.device_decode(1, 0)
        return self._cost.price((Span(0, 0, self._num_steps, False),), {0: load}).total_us

    def _within_target(self, pricing: Pricing, prefill_rows: int) -> int:
        """As many prefill rows as the target for device rows allows beside them, but always some."""
        if self._target_us is None or not pricing.work.device.rows:
            return prefill_rows
        smallest = 16
        while prefill_rows > smallest and pricing.price((prefill_rows, 0), 0, 0, 0).price.total_us > self._target_us:
            prefill_rows = max(smallest, prefill_rows // 2)
        return prefill_rows

    def _begin_lap(self, pricing: Pricing, prefill_rows: int, whole: Choice) -> Choice:
        """Host rows wait for a lap: none of them, all in this iteration (`whole`), or a lap over several."""
        num_host = len(pricing.work.host_tokens)
        if not pricing.work.device.rows:
            return whole
        device_only = pricing.device_only(prefill_rows)
        assert device_only is not None
        if pricing.work.must_run_host:
            slowest = pricing.price((prefill_rows, 0), 0, num_host, self._steps(self._policy.slowest_ratio, 0))
            return min((whole, slowest), key=lambda choice: self._lap_costs_us(choice, device_only))
        best = self._best_ratio(pricing, prefill_rows)
        if self._meets_target(whole) and (best is None or whole.rate > best.rate):
            best = whole
        return best if best and best.rate > self._policy.min_gain * device_only.rate else device_only

    def _advance_lap(self, pricing: Pricing, prefill_rows: int) -> Choice:
        """A host lap is in flight: how far does it get? At the least so far that it ends in time."""
        step = pricing.work.lap_step
        if not pricing.work.device.rows and not prefill_rows:
            return pricing.price((0, 0), 0, 0, self._num_steps - step)
        best = self._best_ratio(pricing, prefill_rows)
        return best or pricing.price((prefill_rows, 0), 0, 0, self._steps(self._policy.slowest_ratio, step))

    def _whole_lap(self, pricing: Pricing, wanted: int, most: int) -> Choice:
        """All host rows make a whole lap now, with the prompts in sub-batch 0, or about a quarter or half of them in
        sub-batch 1."""
        divisions = [(wanted, 0)]
        if wanted > 1:
            half, quarter = -(-wanted // 2), -(-wanted // 4)
            divisions += [(half, half), (wanted - quarter, quarter)]
        return max((self._best_split(pricing, division, most) for division in divisions), key=_rate)

    def _best_split(self, pricing: Pricing, wanted: tuple[int, int], most: int) -> Choice:
        """All host rows make a whole lap now, so many of them in sub-batch 1 that its rate is best."""
        num_host, num_device = len(pricing.work.host_tokens), pricing.work.device.rows

        def split(num_second: int) -> Choice:
            first = min(most, self._cost.filling(wanted[0], num_device + num_host - num_second))
            second = min(most - first, self._cost.filling(wanted[1], num_second))
            steps = self._num_steps if num_second or second else 0
            return pricing.price((first, second), num_host - num_second, num_second, steps)

        leaves_first = not num_device and not wanted[0]
        largest = num_host - 1 if leaves_first else num_host
        best = max((split(n) for n in sorted({0, largest // 2})), key=_rate)
        step = -(-largest // 8)
        for direction in (step, -step):
            while 0 <= best.num_host[1] + direction <= largest:
                near = split(best.num_host[1] + direction)
                if near.rate <= best.rate:
                    break
                best = near
        return best

    def _best_ratio(self, pricing: Pricing, prefill_rows: int) -> Choice | None:
        """The host lap advanced by one part in r, for the r with the best rate that meets the target.

        The rate rises with r while the device waits for the host, and falls once the host waits for the device, or
        rises on if host rows do not pay; so those r are priced that are near to where neither waits, and the largest.
        The others are only where none of those meets the target.
        """
        work = pricing.work
        begin = 0 if work.lap else len(work.host_tokens)

        def meeting_target(numbers: Iterable[int]) -> list[Choice]:
            choices = (pricing.price((prefill_rows, 0), 0, begin, steps) for steps in numbers)
            return [choice for choice in choices if self._meets_target(choice)]

        left, *others = dict.fromkeys(self._steps(ratio, work.lap_step) for ratio in self._ratios)
        whole = pricing.price((prefill_rows, 0), 0, begin, left)
        even_steps = self._even_steps(pricing, prefill_rows, whole, left)
        near = [n for n in others if _FEWEST_STEPS < n / even_steps < _MOST_STEPS or n == others[-1]]
        choices = meeting_target((left,)) + (meeting_target(near) or meeting_target(others))
        return max(choices, key=_rate, default=None)

    def _even_steps(self, pricing: Pricing, prefill_rows: int, whole: Choice, steps: int) -> float:
        """Steps of the host lap whose attention takes as long as the device works meanwhile, by a price of `steps`."""
        alone = pricing.device_only(prefill_rows)
        if alone is None:
            return steps
        added_us = whole.price.device_us - alone.price.device_us
        return steps * alone.price.device_us / max(1.0, whole.price.host_us - added_us)

    def _steps(self, ratio: int, step: int) -> int:
        """Steps of one part in `ratio` of a lap; the rest of it when less than half as much would be left."""
        steps = -(-self._num_steps // ratio)
        left = self._num_steps - step
        return left if left < 1.5 * steps else steps

    def _meets_target(self, choice: Choice) -> bool:
        if self._target_us is None:
            return True
        iterations = self._num_steps / choice.lap_steps if choice.lap_steps else 1.0
        return iterations * choice.price.total_us <= self._target_us

    def _lap_costs_us(self, choice: Choice, device_only: Choice) -> float:
        """What a whole lap of the host rows adds to device-only iterations."""
        iterations = self._num_steps / choice.lap_steps if choice.lap_steps else 1.0
        return iterations * (choice.price.total_us - device_only.price.total_us)


def _rate(choice: Choice) -> float:
    return choice.rate


def _prefill_rows(choice: Choice) -> int:
    return sum(choice.prefill_rows)
