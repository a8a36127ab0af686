"""The scheduler: which sequences live where, and what each iteration does.

Iterations are planned before earlier ones are known: `plan_iteration` works from what the planned ones will have
done (every row that samples yields one token), `commit` from what they did. A sequence that turns out to have ended
may have a row too many in flight; its result is dropped, and its blocks and slot are free once nothing in flight
uses them.

Nobody starves. An admitted sequence is *able* to decode while its pool has a block for its next token. An able
DEVICE sequence has a row in every iteration. An able HOST sequence waits for at most `Policy.slowest_ratio`
iterations (the host lap in flight) plus `Policy.max_skipped` (device-only ones) until a lap begins, which takes at
most `Policy.slowest_ratio`; either may sit out one iteration for a migration. So with the defaults everyone able
gets a token at least every 50 iterations; host rows that pay get one every `Policy.max_ratio` or sooner.
A sequence that is not able goes on once sequences with less remaining need have ended, and nobody enters its pool
before that: after at most as many tokens as those may still generate, each at the interval above.
"""

from __future__ import annotations

from collections import deque

from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import InvalidRequestError
from neoserve.core.plan import IterationPlan, IterationResult, Rows, SubBatch, Tier
from neoserve.core.program import attends_on_host
from neoserve.core.request import Request, TokenEvent
from neoserve.core.stats import EngineStats
from neoserve.scheduling.admission import Admission
from neoserve.scheduling.candidates import NO_PACE, Choice, Chunk, Work, deal
from neoserve.scheduling.cost import CostModel, Price
from neoserve.scheduling.laps import Lap, OpenIteration
from neoserve.scheduling.load import Load
from neoserve.scheduling.outcome import Outcome
from neoserve.scheduling.placement import Placement
from neoserve.scheduling.policy import Policy
from neoserve.scheduling.sequence import Sequence
from neoserve.scheduling.split import Splitter

Prefill = tuple[Sequence, Rows]


class Scheduler:
    """Plans iterations and takes their results, in the same order. One thread uses it."""

    def __init__(self, config: ResolvedConfig, cost: CostModel, policy: Policy | None = None) -> None:
        self._config = config
        self._policy = policy or Policy()
        self._cost = cost
        self._placement = Placement(config, self._policy)
        num_layers = config.shape.num_layers
        targets_us = (_ms_to_us(config.target_tpot_ms), _ms_to_us(config.target_ttft_ms))
        self._splitter = Splitter(cost, num_layers, self._policy, *targets_us)
        self._admission = Admission(config, self._placement, cost, self._splitter)
        self._running: dict[str, Sequence] = {}  # oldest first; finished ones while something of them is in flight
        self._outcome = Outcome(self._placement, self._running, self._admission.free_slots)
        self._open: deque[OpenIteration] = deque()
        self._host_lap: Lap | None = None  # the lap of sub-batch 1 that is not planned to its end
        self._num_steps = num_layers + 1
        self._num_iterations = 0
        self._num_laps = 0
        self._num_skipped = 0  # iterations since host rows could have begun a lap
        self._num_forced = 0  # laps of theirs in a row that began because they had to, not because they paid
        self._num_pipelined = 0
        self._num_failed = 0
        self._sub_batch_rows = (0, 0)
        self._predicted_us = (0.0, 0.0)  # total, last
        self._measured_us = (0.0, 0.0)
        self._host_busy_us = 0.0
        self._host_bytes = 0

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._admission.waiting or self._running or self._open)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises `RequestTooLongError` when it can never fit, `QueueFullError` when too many wait, and
        `InvalidRequestError` when its id is in use.
        """
        if request.request_id in self._running:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use; expected a new one", "request_id")
        self._admission.add(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request, at once or when nothing of it is in flight; no event of it follows.

        Returns whether it was waiting or running; unknown ids are ignored.
        """
        if self._admission.waiting.pop(request_id, None) is not None:
            return True
        sequence = self._running.get(request_id)
        if sequence is None or sequence.finished:
            return False
        self._outcome.end(sequence)
        return True

    def plan_iteration(self) -> IterationPlan | None:
        """The next iteration, or `None` when there is nothing to do before an earlier one is committed.

        A plan that only migrates has no spans.
        """
        running = list(self._running.values())
        self._placement.begin(self._num_iterations)
        period = self._policy.forced_migration_period
        if period and self._num_iterations % period == 0:
            self._placement.force_migration(running)
        device, host = self._decoding(running)
        if not (host or self._host_lap):
            self._num_forced = 0
        host_starves = self._num_forced >= self._policy.most_forced
        if host_starves:
            host = self._refill_device(host)
        prompts, chunks = self._prompts(running, self._config.max_num_batched_tokens - len(device) - len(host))
        if not (host_starves or self._admission.waits_for_device):
            host = self._refill_device(host)
        if not (device or host or chunks or self._host_lap):
            return self._open_iteration([], [], None) if self._placement.departures else None
        choice = self._choose(device, host, chunks)
        return self._carry_out(choice, device, host, prompts, chunks)

    def observe_overhead(self, cpu_us: float) -> None:
        """The caller took so long for an iteration besides launching it and waiting for another one."""
        self._cost.observe_overhead(cpu_us)

    def commit(self, plan: IterationPlan, result: IterationResult) -> list[TokenEvent]:
        """Take the result of the oldest planned iteration: new tokens, and who is finished.

        When it failed, all its laps are lost. Their sequences go back to what is known and run again, once in their
        life and if nothing was lost for good; else they end with finish_reason "error".
        """
        done = self._open.popleft()
        assert done.plan is plan, f"iteration {plan.iteration} is committed, {done.plan.iteration} is the oldest"
        if result.error is None:
            if done.price is not None:
                self._observe(done, done.price, result)
            events = self._outcome.take_tokens(done, result.tokens)
        else:
            self._num_failed += 1
            events = self._outcome.lose(done, result.error)
            if self._host_lap in done.laps:
                self._host_lap = None
        self._outcome.close(done, self._num_steps)
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        kv, migrated = self._placement.kv, self._placement.num_migrated
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            device_blocks_used=kv.num_used(Tier.DEVICE),
            host_blocks_used=kv.num_used(Tier.HOST),
            prompt_tokens_total=self._outcome.num_prompt_tokens,
            device_tokens_total=self._outcome.num_device_tokens,
            host_tokens_total=self._outcome.num_host_tokens,
            iterations_total=self._num_iterations,
            pipelined_iterations_total=self._num_pipelined,
            failed_iterations_total=self._num_failed,
            migrations_to_host_total=migrated[Tier.HOST],
            migrations_to_device_total=migrated[Tier.DEVICE],
            sub_batch_rows=self._sub_batch_rows,
            predicted_us_total=self._predicted_us[0],
            measured_us_total=self._measured_us[0],
            last_predicted_us=self._predicted_us[1],
            last_measured_us=self._measured_us[1],
            prediction_error=self._cost.error,
            host_busy_us_total=self._host_busy_us,
            host_bytes_total=self._host_bytes,
        )

    def check_integrity(self) -> None:
        """Every block, slot and request is accounted for exactly once, both pools are safe."""
        self._placement.kv.check_integrity()
        slots = [sequence.slot for sequence in self._running.values()] + self._admission.free_slots
        assert sorted(slots) == list(range(self._admission.num_slots)), "a slot is lost or has two owners"
        assert not self._running.keys() & self._admission.waiting.keys(), "a request both waits and runs"
        departures = [departure for iteration in self._open for departure in iteration.departures]
        owned = {s.residence for s in self._running.values()} | {d.residence for d in departures}
        residents = {resident for tier in Tier for resident in self._placement.kv.residents(tier)}
        assert owned == residents, "a pool holds blocks of nobody, or a sequence has none"
        laps = {lap for iteration in self._open for lap in iteration.laps} | {self._host_lap} - {None}
        pinned = [s for lap in laps if lap for s in lap.sequences] + [d.sequence for d in departures]
        for sequence in self._running.values():
            assert sequence.pins == pinned.count(sequence), f"pins of {sequence.request.request_id} are wrong"
            assert sequence.pins or not sequence.finished, f"{sequence.request.request_id} ended and is still here"

    def _decoding(self, running: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        """The DEVICE and the HOST sequences that can decode now, with room for their next token, oldest first."""
        device: list[Sequence] = []
        host: list[Sequence] = []
        for sequence in running:
            if sequence.may_run and not sequence.is_prefilling:
                (device if sequence.residence.tier is Tier.DEVICE else host).append(sequence)
        if self._placement.departures:
            device, host = self._staying(device), self._staying(host)
        device = self._placement.grow(Tier.DEVICE, device, running)
        self._placement.relieve_device(running)
        host = self._placement.grow(Tier.HOST, host, running)
        if self._placement.departures:
            device = self._staying(device)
        return device, host

    def _refill_device(self, host: list[Sequence]) -> list[Sequence]:
        """Let host sequences move to room in the device pool; returns those that stay."""
        self._placement.refill_device(host)
        return self._staying(host)

    def _staying(self, sequences: list[Sequence]) -> list[Sequence]:
        return [sequence for sequence in sequences if self._placement.stays(sequence)]

    def _prompts(self, running: list[Sequence], budget: int) -> tuple[list[Sequence], list[Chunk]]:
        """The next chunk of each prompt, oldest first, admitting requests while the row budget lasts."""
        prompts: list[Sequence] = []
        chunks: list[Chunk] = []
        staging = self._config.staging_blocks

        def add(sequence: Sequence) -> bool:
            nonlocal budget, staging
            start, on_host = sequence.computed, sequence.tier is Tier.HOST
            count = min(sequence.given - start, budget)
            if on_host:
                count = min(count, staging * self._config.block_size - start)
            if count <= 0:
                return False
            budget -= count
            staging -= self._config.blocks_for(start + count) if on_host else 0
            prompts.append(sequence)
            chunks.append(Chunk(sequence.tier, start, count, start + count == sequence.given))
            return True

        for sequence in running:
            if not (sequence.is_prefilling and sequence.may_run and self._placement.stays(sequence)):
                continue
            if not add(sequence):
                return prompts, chunks
        host_only = False
        while budget > 0:
            admitted = self._admission.admit(self._running, self._num_iterations, host_only=host_only)
            if admitted is None or not add(admitted):
                break
            host_only = admitted.tier is Tier.HOST
        return prompts, chunks

    def _choose(self, device: list[Sequence], host: list[Sequence], chunks: list[Chunk]) -> Choice:
        lap = self._host_lap
        running = self._running.values()
        work = Work(
            reference=self._admission.outlook(running, self._num_iterations).reference,
            device=Load.device_decode(len(device), sum(s.computed for s in device) + len(device)),
            chunks=tuple(chunks),
            pace=self._admission.pace(running, self._num_iterations) if chunks else NO_PACE,
            host_tokens=() if lap else tuple(s.computed + 1 for s in host),
            lap=lap.load if lap else None,
            lap_step=lap.next_step if lap else 0,
            must_run_host=self._num_skipped >= self._policy.max_skipped,
        )
        choice = self._splitter.choose(work)
        waits = work.host_tokens and not any(choice.num_host)
        self._num_skipped = self._num_skipped + 1 if waits else 0
        if work.host_tokens and not waits:
            self._num_forced = self._num_forced + 1 if work.must_run_host else 0
        return choice

    def _carry_out(
        self, choice: Choice, device: list[Sequence], host: list[Sequence], prompts: list[Sequence], chunks: list[Chunk]
    ) -> IterationPlan:
        """Turn a choice into laps and their rows, and count them as done."""
        num_first, num_second = choice.num_host
        begins = []
        prefill = self._prefill(choice, prompts, chunks)
        first, second = host[num_second : num_second + num_first], host[:num_second]
        if prefill[0] or device or first:
            begins.append(self._begin_lap(0, prefill[0], device, first))
        if prefill[1] or second:
            self._host_lap = self._begin_lap(1, prefill[1], [], second)
            begins.append(self._host_lap)
        advances = [(lap, self._num_steps) for lap in begins if lap.sub_batch.index == 0]
        if self._host_lap and choice.lap_steps:
            advances.append((self._host_lap, choice.lap_steps))
        plan = self._open_iteration(begins, advances, choice)
        if self._host_lap:
            self._hold(self._host_lap)
        return plan

    def _prefill(self, choice: Choice, prompts: list[Sequence], chunks: list[Chunk]) -> list[list[Prefill]]:
        """The prompts' rows in each sub-batch, those of DEVICE sequences first; prompts share no staging blocks."""
        first_staged = num_staged = 0
        rows: list[list[Prefill]] = [[], []]
        for part in deal(chunks, choice.prefill_rows):
            sequence, chunk = prompts[part.index], chunks[part.index]
            first_staged = first_staged if part.continues else num_staged
            if chunk.tier is Tier.HOST:
                num_staged = first_staged + self._config.blocks_for(chunk.start + part.offset + part.count)
            planned = sequence.prefill_rows(
                part.count,
                self._config.block_size,
                tuple(range(first_staged, num_staged)),
                continues=part.continues,
            )
            rows[part.sub_batch].append((sequence, planned))
        for prefill in rows:
            prefill.sort(key=lambda entry: entry[0].tier is Tier.HOST)
        return rows

    def _begin_lap(self, index: int, prefill: list[Prefill], device: list[Sequence], host: list[Sequence]) -> Lap:
        block_size = self._config.block_size
        sub_batch = SubBatch(
            index,
            self._num_laps,
            tuple([rows for _, rows in prefill]),
            tuple([sequence.decode_rows(block_size) for sequence in device]),
            tuple([sequence.decode_rows(block_size) for sequence in host]),
        )
        self._num_laps += 1
        lap = Lap(sub_batch, [sequence for sequence, _ in prefill] + device + host)
        for sequence in lap.sequences:
            sequence.pins += 1
        return lap

    def _hold(self, lap: Lap) -> None:
        """The sequences of a lap that goes on are not free for another; those of one planned to its end are.

        It has no say over those that an earlier failure took back: they wait until nothing of them is in flight.
        """
        goes_on = lap.next_step < self._num_steps
        for sequence, epoch in zip(lap.sequences, lap.epochs, strict=True):
            if sequence.epoch == epoch:
                sequence.in_lap = goes_on
        if not goes_on:
            self._host_lap = None

    def _open_iteration(
        self, begins: list[Lap], advances: list[tuple[Lap, int]], choice: Choice | None
    ) -> IterationPlan:
        """Put the iteration's decisions into a plan and remember it until its commit."""
        price = choice.price if choice else None
        spans = tuple([lap.advance(num_steps) for lap, num_steps in advances])
        laps = tuple([lap for lap, _ in advances])
        plan = IterationPlan(
            iteration=self._num_iterations,
            begins=tuple([lap.sub_batch for lap in begins]),
            spans=spans,
            ends=tuple([lap.sub_batch for lap in laps if lap.next_step == self._num_steps]),
            migrations=tuple(self._placement.migrations),
            predicted_us=price.total_us if price else 0.0,
        )
        self._open.append(OpenIteration(plan, laps, tuple(self._placement.departures), price))
        self._num_iterations += 1
        self._num_pipelined += attends_on_host(spans)
        rows = {lap.sub_batch.index: lap.sub_batch.num_rows for lap in laps}
        self._sub_batch_rows = (rows.get(0, 0), rows.get(1, 0))
        return plan

    def _observe(self, done: OpenIteration, price: Price, result: IterationResult) -> None:
        self._cost.observe(price, result.elapsed_us)
        self._admission.observe(result.elapsed_us)
        ended = [lap.load for lap in done.laps if lap.has_host and lap.sub_batch in done.plan.ends]
        self._cost.observe_host(ended, result.host_busy_us)
        self._predicted_us = (self._predicted_us[0] + price.total_us, price.total_us)
        self._measured_us = (self._measured_us[0] + result.elapsed_us, result.elapsed_us)
        self._host_busy_us += result.host_busy_us
        self._host_bytes += result.host_bytes


def _ms_to_us(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * 1e3
