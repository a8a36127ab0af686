"""Plans made by hand against transformers: every program, both tiers, migrations between any two laps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from neoserve import _native
from neoserve.core.config import ResolvedConfig
from neoserve.core.plan import IterationPlan, IterationResult, Migration, Rows, SubBatch, Tier
from neoserve.core.program import Span
from neoserve.core.request import Request, SamplingParams
from neoserve.device.base import Device
from neoserve.engine.build import make_device
from neoserve.engine.resolve import Threads
from neoserve.execution.executor import Executor
from neoserve.execution.graphs import StageGraphs
from neoserve.execution.linear import EagerLinear
from neoserve.models.checkpoint import open_checkpoint
from neoserve.models.decoder import Decoder
from neoserve.models.weights import load_weights
from tests.engine.conftest import Tiny
from tests.engine.driving import DEVICE, DTYPE, ON_GPU, check_greedy

PROMPT = tuple(range(3, 23))
NUM_TOKENS = 12
BLOCKS_EACH = 3
STEPS = 4  # of a lap over the tiny model's three layers


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[int]:
    with torch.inference_mode():
        out = tiny.model.generate(
            torch.tensor([PROMPT]), do_sample=False, min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(PROMPT) :].tolist()


def device_for(tiny: Tiny) -> Device:
    shape = open_checkpoint(tiny.path).spec.shape
    return make_device(DEVICE, shape, DTYPE, 16, Threads((), num_compute=2, num_beside_workers=1))


def make_small(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model's layers be a good part of the device's memory, as those of 70B are of an H200's."""
    monkeypatch.setattr(device, "total_bytes", lambda: 2**16)


def make_executor(tiny: Tiny, device: Device, *, host_blocks: int = 12, enforce_eager: bool = False) -> Executor:
    spec = open_checkpoint(tiny.path).spec
    weights = load_weights(spec, Path(tiny.path), getattr(torch, DTYPE), device.torch_device)
    config = ResolvedConfig(
        model_name="tiny", shape=spec.shape, dtype=DTYPE, device=DEVICE, seed=0, max_model_len=256,
        max_num_seqs=4, max_num_batched_tokens=64, block_size=16, offload="auto" if host_blocks else "off",
        device_blocks=12, host_blocks=host_blocks, staging_blocks=6,
        worker_cpus=tuple(_native.allowed_cpus()[:1]), host_deadline_s=5.0,
        target_tpot_ms=None, target_ttft_ms=None, max_waiting=8, enforce_eager=enforce_eager,
    )  # fmt: skip
    return Executor(config, Decoder(spec, weights, device.ops, config.max_model_len), device)


@pytest.fixture(params=["recorded", "recorded for a small device", "eager"])
def executor(tiny: Tiny, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    is_eager, device = request.param == "eager", device_for(tiny)
    if "small" in request.param:
        make_small(device, monkeypatch)
    made = make_executor(tiny, device, enforce_eager=is_eager)
    assert bool(made.record_graphs()) != is_eager
    for name in ("a", "b"):
        made.add(Request(name, PROMPT, SamplingParams(temperature=0, max_tokens=NUM_TOKENS), (), 0.0))
    yield made
    made.close()


class Script:
    """Two sequences, `a` in slot 0 and `b` in slot 1, each in the tier that it was given, and the plans for them."""

    def __init__(self, executor: Executor, tiers: dict[str, Tier]) -> None:
        self.executor = executor
        self.tiers = tiers
        self.length = dict.fromkeys(tiers, 0)
        self.generated = dict.fromkeys(tiers, 0)
        self.first_block = {"a": 0, "b": BLOCKS_EACH}
        self.tokens: dict[str, list[int]] = {name: [] for name in tiers}
        self.iterations = self.laps = 0

    def rows(self, name: str, token_ids: tuple[int, ...] | None, *, continues: bool = False) -> Rows:
        """The next rows of a sequence: a chunk of its prompt, or a decode."""
        count = 1 if token_ids is None else len(token_ids)
        slot = "ab".index(name)
        staged = token_ids is not None and self.tiers[name] is Tier.HOST
        staging = tuple(range(slot * BLOCKS_EACH, (slot + 1) * BLOCKS_EACH)) if staged else ()
        blocks = self.blocks(name, self.length[name] + count)
        rows = Rows(
            name, slot, self.tiers[name], self.length[name], count, token_ids, blocks, staging[: len(blocks)],
            samples=self.length[name] + count >= len(PROMPT), num_generated=self.generated[name], continues=continues,
        )  # fmt: skip
        self.length[name] += count
        self.generated[name] += rows.samples
        return rows

    def blocks(self, name: str, length: int) -> np.ndarray:
        """The block table of a sequence of `length` tokens."""
        first = self.first_block[name]
        return np.arange(first, first - (-length // 16), dtype=np.int32)

    def lap(self, index: int, *rows: Rows) -> SubBatch:
        """A lap of the rows."""
        self.laps += 1
        prefill = sorted((r for r in rows if r.is_prefill), key=lambda r: r.tier is Tier.HOST)
        device = tuple(r for r in rows if not r.is_prefill and r.tier is Tier.DEVICE)
        host = tuple(r for r in rows if not r.is_prefill and r.tier is Tier.HOST)
        return SubBatch(index, self.laps, tuple(prefill), device, host)

    def plan(
        self, *spans: Span, begins: tuple[SubBatch, ...], ends: tuple[SubBatch, ...], moves: tuple[Migration, ...] = ()
    ) -> IterationPlan:
        """The next iteration."""
        self.iterations += 1
        return IterationPlan(self.iterations, begins, spans, ends, moves, 0.0)

    def run(self, plans: list[IterationPlan]) -> None:
        """Launch each plan before the one before is collected, as the engine does."""
        launched = None
        for plan in plans:
            following = self.executor.launch(plan)
            if launched is not None:
                self.take(self.executor.collect(launched))
            launched = following
        assert launched is not None
        self.take(self.executor.collect(launched))

    def take(self, result: IterationResult) -> None:
        """Keep the tokens of an iteration."""
        assert result.error is None
        for token in result.tokens:
            if token.token_id is not None:
                self.tokens[token.request_id].append(token.token_id)

    def prefill(self, chunks: tuple[slice, ...]) -> list[IterationPlan]:
        """Both prompts, chunk by chunk, in one sub-batch."""
        plans = []
        for chunk in chunks:
            lap = self.lap(0, *(self.rows(name, PROMPT[chunk]) for name in self.tiers))
            plans.append(self.plan(Span(0, 0, STEPS, False), begins=(lap,), ends=(lap,)))
        return plans

    def migrate(self, name: str) -> Migration:
        """Move a sequence to fresh blocks of the other tier."""
        old = self.blocks(name, self.length[name])
        self.first_block[name] = (self.first_block[name] + 2 * BLOCKS_EACH) % (4 * BLOCKS_EACH)
        new = self.blocks(name, self.length[name])
        source = self.tiers[name]
        self.tiers[name] = Tier.HOST if source is Tier.DEVICE else Tier.DEVICE
        return Migration(name, source, old, new, self.length[name])

    def check(self, tiny: Tiny, expected: dict[str, list[int]]) -> None:
        """The tokens of each sequence are right."""
        assert self.tokens.keys() == expected.keys()
        for name, tokens in expected.items():
            check_greedy(tiny.model, PROMPT, self.tokens[name], tokens)

    def has_host(self, name: str) -> bool:
        """Whether the sequence decodes on the host."""
        return self.tiers[name] is Tier.HOST


WHOLE = (slice(0, 20),)
CHUNKS = (slice(0, 7), slice(7, 16), slice(16, 20))
PLACEMENTS = [
    {"a": Tier.DEVICE, "b": Tier.DEVICE},
    {"a": Tier.DEVICE, "b": Tier.HOST},
    {"a": Tier.HOST, "b": Tier.HOST},
]


@pytest.mark.parametrize("tiers", PLACEMENTS)
@pytest.mark.parametrize("chunks", [WHOLE, CHUNKS])
def test_one_sub_batch(
    executor: Executor, tiny: Tiny, expected: list[int], tiers: dict[str, Tier], chunks: tuple[slice, ...]
) -> None:
    script = Script(executor, dict(tiers))
    plans = script.prefill(chunks)
    for _ in range(NUM_TOKENS - 1):
        lap = script.lap(0, script.rows("a", None), script.rows("b", None))
        has_host = Tier.HOST in tiers.values()
        plans.append(script.plan(Span(0, 0, STEPS, has_host), begins=(lap,), ends=(lap,)))
    script.run(plans)
    script.check(tiny, {"a": expected, "b": expected})


@pytest.mark.parametrize("tiers", PLACEMENTS)
@pytest.mark.parametrize("migrating", [(), ("a",), ("b",), ("a", "b")])
def test_lock_step_with_migrations_before_every_iteration(
    executor: Executor, tiny: Tiny, expected: list[int], tiers: dict[str, Tier], migrating: tuple[str, ...]
) -> None:
    script = Script(executor, dict(tiers))
    plans = script.prefill(WHOLE)
    for _ in range(NUM_TOKENS - 1):
        moves = tuple(script.migrate(name) for name in migrating)
        laps = (script.lap(0, script.rows("a", None)), script.lap(1, script.rows("b", None)))
        spans = (Span(0, 0, STEPS, script.has_host("a")), Span(1, 0, STEPS, script.has_host("b")))
        plans.append(script.plan(*spans, begins=laps, ends=laps, moves=moves))
    script.run(plans)
    script.check(tiny, {"a": expected, "b": expected})


@pytest.mark.parametrize("cuts", [(2,), (1, 3), (1, 2, 3)])
def test_a_host_lap_over_several_device_laps(
    executor: Executor, tiny: Tiny, expected: list[int], cuts: tuple[int, ...]
) -> None:
    script = Script(executor, {"a": Tier.DEVICE, "b": Tier.HOST})
    plans = script.prefill(CHUNKS)
    parts = list(zip((0, *cuts), (*cuts, STEPS), strict=True))
    host_lap = None
    for turn in range(NUM_TOKENS - 1):
        first, stop = parts[turn % len(parts)]
        device_lap = script.lap(0, script.rows("a", None))
        begins: tuple[SubBatch, ...] = (device_lap,)
        if first == 0:
            host_lap = script.lap(1, script.rows("b", None))
            begins += (host_lap,)
        assert host_lap is not None
        ends = (device_lap, host_lap) if stop == STEPS else (device_lap,)
        spans = (Span(0, 0, STEPS, False), Span(1, first, stop, True))
        plans.append(script.plan(*spans, begins=begins, ends=ends))
    script.run(plans)
    num_host_laps = (NUM_TOKENS - 1) // len(parts)
    script.check(tiny, {"a": expected, "b": expected[: 1 + num_host_laps]})


@pytest.mark.parametrize("tiers", PLACEMENTS)
@pytest.mark.parametrize("cuts", [(0, 9, 20), (7, 12, 20), (7, 16, 19), (16, 17, 20)])
def test_prompts_divided_between_the_sub_batches(
    executor: Executor, tiny: Tiny, expected: list[int], tiers: dict[str, Tier], cuts: tuple[int, int, int]
) -> None:
    """Both prompts' tokens from cuts[0] on in one iteration, those from cuts[1] in the second sub-batch."""
    start, middle, stop = cuts
    script = Script(executor, dict(tiers))
    plans = script.prefill((slice(0, start),)) if start else []
    laps = tuple(
        script.lap(index, *(script.rows(name, PROMPT[part], continues=index == 1) for name in tiers))
        for index, part in enumerate((slice(start, middle), slice(middle, stop)))
    )
    plans.append(script.plan(Span(0, 0, STEPS, False), Span(1, 0, STEPS, False), begins=laps, ends=laps))
    if stop < len(PROMPT):
        plans += script.prefill((slice(stop, None),))
    for _ in range(NUM_TOKENS - 1):
        lap = script.lap(0, script.rows("a", None), script.rows("b", None))
        plans.append(script.plan(Span(0, 0, STEPS, Tier.HOST in tiers.values()), begins=(lap,), ends=(lap,)))
    script.run(plans)
    script.check(tiny, {"a": expected, "b": expected})


@pytest.mark.parametrize("sizes", [(), (16, 32)])
def test_the_last_layer_may_end_with_some_of_the_rows(tiny: Tiny, sizes: tuple[int, ...]) -> None:
    """Of 20 rows, which fill up a recording of 32, in any order: those of 16 do."""
    device = device_for(tiny)
    executor = make_executor(tiny, device)
    model, dtype = executor.model, getattr(torch, DTYPE)
    results: list[torch.Tensor] = []

    def work() -> None:
        graphs = StageGraphs(device, model, dtype, sizes, one_by_one=False) if sizes else None
        for size in sizes:
            assert graphs is not None
            graphs.record(size)
        token_ids_T = torch.tensor(PROMPT, device=device.torch_device)
        row_ids_B = torch.tensor([19, 3, 4], device=device.torch_device)
        for wanted in (None, row_ids_B):
            linear = graphs.linear(len(PROMPT)) if graphs is not None else EagerLinear(model)
            assert linear is not None
            linear.embed(token_ids_T, token_ids_T)
            for layer in range(model.shape.num_layers):
                linear.pre(layer)
                linear.attn_THD.copy_(linear.qkv_TCD[:, : model.shape.num_query_heads])
                linear.post(layer, wanted if layer == model.shape.num_layers - 1 else None)
            results.append(linear.x_TE.clone())
        results[0] = results[0][row_ids_B]

    device.submit(work).wait()
    torch.testing.assert_close(results[1][:3], results[0])
    executor.close()


@pytest.mark.skipif(ON_GPU, reason="a GPU has cores of its own")
def test_the_model_has_all_its_threads_unless_the_workers_attend(executor: Executor) -> None:
    script = Script(executor, {"a": Tier.DEVICE, "b": Tier.HOST})
    [prompts] = script.prefill((slice(0, len(PROMPT)),))
    lap = script.lap(0, script.rows("a", None), script.rows("b", None))
    decodes = script.plan(Span(0, 0, STEPS, True), begins=(lap,), ends=(lap,))
    threads = []
    for plan in (prompts, decodes):
        seen: set[int] = set()
        executor.collect(executor.launch(plan, lambda _, seen=seen: seen.add(torch.get_num_threads())))
        threads.append(seen)
    assert threads == [{2}, {1}]


@pytest.mark.parametrize("host_blocks", [0, 12])
@pytest.mark.parametrize("is_small", [False, True])
def test_steps_are_recorded_for_each_sub_batch_and_those_of_decodes_for_short_layers(
    tiny: Tiny, is_small: bool, host_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_for(tiny)
    if is_small:
        make_small(device, monkeypatch)
    made = make_executor(tiny, device, host_blocks=host_blocks)
    recorded = made.record_graphs()
    sizes = made.recorded_rows
    made.close()
    laps, decodes_in_steps, buckets_of_rows = 3, 3, 3  # up to 4 sequences, and up to 64 rows
    expected = {
        (False, 0): laps + buckets_of_rows,
        (False, 12): laps + 2 * buckets_of_rows + decodes_in_steps,
        (True, 0): laps + buckets_of_rows,
        (True, 12): laps + 2 * buckets_of_rows,
    }
    assert recorded is not None
    assert recorded.num_sets == expected[is_small, host_blocks]
    assert sizes == (16, 32, 64)
