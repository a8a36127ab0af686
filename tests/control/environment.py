"""What surrounds the scheduler in these tests: an executor without a model, over pools that remember what is where.

Each KV slot holds (request, position) and each sequence slot the last sampled (request, number); a row whose inputs
are not what they should be yields `POISON`. A request's true tokens depend only on its id, so the tests know them.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from neoserve.core.config import ModelShape, ResolvedConfig
from neoserve.core.plan import IterationPlan, IterationResult, Rows, SampledToken, SubBatch, Tier
from neoserve.core.program import program
from neoserve.core.request import Request, SamplingParams, TokenEvent
from neoserve.scheduling.cost import CostModel
from neoserve.scheduling.load import Load
from neoserve.scheduling.policy import Policy
from neoserve.scheduling.scheduler import Scheduler
from neoserve.scheduling.table import CostTable

POISON = -1
STOP = 0
SHAPE = ModelShape(5, 8, 2, 64, 512, 1024, 1000, 4096, False)
LARGE = ModelShape(80, 64, 8, 128, 8192, 28672, 128256, 131072, False)
H200_LINEAR_US = (
    (1, 415.0), (64, 447.0), (128, 504.0), (256, 723.0), (384, 1075.0), (512, 1454.0), (768, 2020.0), (1024, 2640.0),
    (2048, 5200.0),
)  # fmt: skip
"""Linear layers of `LARGE` by rows, as an H200 takes them."""


def config(**changes: object) -> ResolvedConfig:
    """A small engine: two pools of 40 and 80 blocks of 16 tokens."""
    base = ResolvedConfig(
        model_name="test",
        shape=SHAPE,
        dtype="bfloat16",
        device="reference",
        seed=0,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        block_size=16,
        offload="auto",
        device_blocks=40,
        host_blocks=80,
        staging_blocks=32,
        worker_cpus=(0,),
        host_deadline_s=1.0,
        target_tpot_ms=None,
        target_ttft_ms=None,
        max_waiting=1000,
        enforce_eager=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def scheduler_for(settings: ResolvedConfig, policy: Policy | None = None, **rates: float) -> Scheduler:
    table = CostTable.rough(settings.shape, **rates)  # type: ignore[arg-type]
    return Scheduler(settings, CostModel(table, settings.shape), policy)


def true_token(request_id: str, number: int, vocabulary: int = 50) -> int:
    """Token `number` of a request; `STOP` with a chance of one in `vocabulary`."""
    return zlib.crc32(f"{request_id}/{number}".encode()) % vocabulary


def request(request_id: str, prompt: int, max_tokens: int, *, stops: bool = False, **params: object) -> Request:
    return Request(
        request_id,
        tuple(range(1, prompt + 1)),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        (STOP,) if stops else (),
        0.0,
    )


def true_output(sent: Request) -> list[int]:
    """What a request should come to."""
    output: list[int] = []
    for number in range(sent.params.max_tokens or 0):
        output.append(true_token(sent.request_id, number))
        if output[-1] in sent.stop_ids:
            break
    return output


class Machine:
    """Carries out plans on pools of labels, in the order of launch."""

    def __init__(self, settings: ResolvedConfig, fails: Callable[[IterationPlan], bool] = lambda plan: False) -> None:
        blocks = {Tier.DEVICE: settings.device_blocks, Tier.HOST: settings.host_blocks}
        self.settings = settings
        self.fails = fails
        self.kv: dict[Tier, list[object]] = {tier: [None] * (n * settings.block_size) for tier, n in blocks.items()}
        self.sampled: list[object] = [None] * settings.max_num_seqs
        self.in_flight: dict[int, tuple[SubBatch, int]] = {}
        self.lost: set[int] = set()  # sub-batches whose lap in flight failed; the iteration after may still advance it
        self.laps_with_host = 0
        self.truth = CostModel(CostTable.rough(settings.shape), settings.shape)

    def run(self, plan: IterationPlan) -> IterationResult:
        """Migrate, begin laps, advance them, and say what the ended ones yield."""
        failed = self.fails(plan)
        self.migrate(plan)
        for lap in plan.begins:
            assert lap.index not in self.in_flight or lap.index in self.lost, "a lap begins on buffers that are in use"
            self.lost.discard(lap.index)
            self.in_flight[lap.index] = (lap, 0)
        self.check_rows(plan)
        steps = self.settings.shape.num_layers + 1
        ended: list[SubBatch] = []
        loads = {index: Load.of(lap) for index, (lap, _) in self.in_flight.items()}
        elapsed_us = self.truth.price(plan.spans, loads).total_us if plan.spans else 0.0
        for span in plan.spans:
            lap, step = self.in_flight[span.sub_batch]
            assert span.first_step == step
            assert span.has_host == bool(lap.host_decode)
            self.laps_with_host += span.has_host and step == 0
            self.in_flight[span.sub_batch] = (lap, span.stop_step)
            if span.stop_step == steps:
                ended.append(lap)
                self.lost.discard(span.sub_batch)
                del self.in_flight[span.sub_batch]
        assert tuple(ended) == plan.ends
        list(program(steps - 1, plan.spans))
        if failed:
            advanced = [lap for index, (lap, _) in self.in_flight.items() if index in {s.sub_batch for s in plan.spans}]
            for lap in [*ended, *advanced]:
                for rows in lap.rows:
                    self.spoil(rows)
            self.lost.update(lap.index for lap in advanced)
            return IterationResult((), 1000.0, error="a worker died")
        tokens = tuple(self.compute(rows) for lap in ended for rows in lap.rows)
        return IterationResult(tokens, 1.1 * elapsed_us)

    def migrate(self, plan: IterationPlan) -> None:
        """Copy from what was there before the iteration: migrations may run in any order, beside the laps."""
        before = {tier: list(labels) for tier, labels in self.kv.items()} if plan.migrations else {}
        moving = {migration.request_id for migration in plan.migrations}
        laps = [*plan.begins, *(lap for lap, _ in self.in_flight.values() if lap.index not in self.lost)]
        busy = {rows.request_id for lap in laps for rows in lap.rows}
        assert not moving & busy, "a sequence migrates while a lap has it"
        for move in plan.migrations:
            target = Tier.HOST if move.source is Tier.DEVICE else Tier.DEVICE
            assert len(move.source_block_ids) == len(move.target_block_ids)
            for position in range(move.num_tokens):
                source = self.slot(move.source_block_ids, position)
                self.kv[target][self.slot(move.target_block_ids, position)] = before[move.source][source]

    def check_rows(self, plan: IterationPlan) -> None:
        """Laps in flight share no sequence and no block, but for a prompt that is divided; they keep to every limit."""
        laps = [lap for lap, _ in self.in_flight.values() if lap.index not in self.lost]
        divided = self.check_divided(plan)
        rows = [r for lap in laps for r in lap.rows if r not in divided]
        assert len({r.request_id for r in rows}) == len(rows), "a sequence is in two laps"
        assert len({r.slot for r in rows}) == len(rows)
        blocks = [(r.tier, int(block)) for r in rows for block in r.block_ids]
        blocks += [(move.source, int(block)) for move in plan.migrations for block in move.source_block_ids]
        assert len(set(blocks)) == len(blocks), "two uses of a block"
        assert sum(lap.num_rows for lap in plan.begins) <= self.settings.max_num_batched_tokens
        for lap in plan.begins:
            tiers = [r.tier for r in lap.prefill]
            assert tiers == sorted(tiers, key=lambda tier: tier is Tier.HOST), "HOST prompts before DEVICE ones"
        staging = [block for r in rows for block in r.staging_block_ids]
        assert len(set(staging)) == len(staging), "two uses of a staging block"
        assert all(block < self.settings.staging_blocks for block in staging)
        for r in rows:
            needed = self.settings.blocks_for(r.length)
            assert len(r.block_ids) == needed
            assert len(r.staging_block_ids) == (needed if r.is_prefill and r.tier is Tier.HOST else 0)
            assert r.slot < self.settings.max_num_seqs

    def check_divided(self, plan: IterationPlan) -> list[Rows]:
        """The rows of sub-batch 0 that go on in sub-batch 1, whose blocks begin with theirs."""
        steps = self.settings.shape.num_layers + 1
        first = {r.request_id: r for lap in plan.begins if lap.index == 0 for r in lap.prefill}
        divided = []
        for r in (r for lap in plan.begins for r in lap.prefill if r.continues):
            assert [(s.sub_batch, s.first_step, s.stop_step) for s in plan.spans] == [(0, 0, steps), (1, 0, steps)]
            before = first[r.request_id]
            assert before.length == r.start
            for part, whole in ((before.block_ids, r.block_ids), (before.staging_block_ids, r.staging_block_ids)):
                assert list(part) == list(whole[: len(part)])
            divided.append(before)
        return divided

    def slot(self, block_ids: Sequence[int], position: int) -> int:
        return (
            int(block_ids[position // self.settings.block_size]) * self.settings.block_size
            + position % self.settings.block_size
        )

    def compute(self, rows: Rows) -> SampledToken:
        labels = self.kv[rows.tier]
        good = all(labels[self.slot(rows.block_ids, p)] == (rows.request_id, p) for p in range(rows.start))
        if rows.token_ids is None:
            good = good and self.sampled[rows.slot] == (rows.request_id, rows.num_generated - 1)
        for position in range(rows.start, rows.length):
            labels[self.slot(rows.block_ids, position)] = (rows.request_id, position) if good else None
        if not rows.samples:
            return SampledToken(rows.request_id, None)
        self.sampled[rows.slot] = (rows.request_id, rows.num_generated) if good else None
        return SampledToken(rows.request_id, true_token(rows.request_id, rows.num_generated) if good else POISON)

    def spoil(self, rows: Rows) -> None:
        """What a failed lap leaves behind."""
        for position in range(rows.start, rows.length):
            self.kv[rows.tier][self.slot(rows.block_ids, position)] = None
        if rows.samples:
            self.sampled[rows.slot] = None


class Loop:
    """The engine's loop: iteration N + 1 is planned and launched before N is committed."""

    def __init__(self, scheduler: Scheduler, machine: Machine, *, ahead: int = 1) -> None:
        self.scheduler = scheduler
        self.machine = machine
        self.ahead = ahead
        self.launched: deque[tuple[IterationPlan, IterationResult]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.last_token: dict[str, int] = {}
        self.num_iterations = 0
        self.plans: list[IterationPlan] = []

    def step(self) -> list[TokenEvent]:
        """Plan and launch one iteration if there is one; commit the oldest if enough are in flight."""
        plan = self.scheduler.plan_iteration()
        if plan is not None:
            self.plans.append(plan)
            self.launched.append((plan, self.machine.run(plan)))
            self.num_iterations += 1
        events: list[TokenEvent] = []
        if self.launched and (plan is None or len(self.launched) > self.ahead):
            events = self.scheduler.commit(*self.launched.popleft())
        for event in events:
            assert event.request_id not in self.finished, "an event after the end"
            self.outputs.setdefault(event.request_id, []).extend(event.token_ids)
            self.last_token[event.request_id] = self.num_iterations
            if event.finish_reason:
                self.finished[event.request_id] = event.finish_reason
        self.scheduler.check_integrity()
        return events

    def drain(self, limit: int = 20_000) -> None:
        """Run until nothing is left; fails when it takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.num_running} running, {self.scheduler.num_waiting} waiting: stuck")


def random_requests(rng: random.Random, count: int, longest: int, stops: bool = True) -> Iterator[Request]:
    for index in range(count):
        prompt = rng.choice((1, 15, 16, 17, rng.randint(1, longest)))
        yield request(f"r{index}", prompt, rng.choice((1, 2, 17, rng.randint(1, longest))), stops=stops)
