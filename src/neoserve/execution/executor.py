"""Carries out iteration plans: `launch` enqueues all of one and returns at once, `collect` waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from neoserve import _native
from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import HostAttentionError
from neoserve.core.plan import IterationPlan, IterationResult
from neoserve.core.program import Span, Stage, attends_on_host, program
from neoserve.core.request import Request
from neoserve.device.base import Completion, Device
from neoserve.execution.graphs import Graphs, Recorded
from neoserve.execution.handoff import HandOff
from neoserve.execution.issue import OnStage, arm, issue, replay
from neoserve.execution.kv_store import KVStore
from neoserve.execution.lap import Lap, Sequence, Workshop
from neoserve.execution.moves import Moves
from neoserve.execution.sampling import SamplingState
from neoserve.kernels.host_attention import host_attention
from neoserve.models.decoder import Decoder

NUM_SUB_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Launched:
    """An iteration on its way. `laps` are those that the plan's spans advance, by sub-batch index."""

    plan: IterationPlan
    laps: dict[int, Lap]
    completion: Completion


class Executor:
    """The model, both pools, the worker pool and the laps in flight."""

    def __init__(self, config: ResolvedConfig, model: Decoder, device: Device) -> None:
        self.config = config
        self.device = device
        self.model = model
        self.store = KVStore(config, device)
        self.pool: _native.WorkerPool | None = None
        handoffs: tuple[HandOff, ...] = ()
        if config.host_blocks:
            self.pool = _native.WorkerPool(config.worker_cpus, deadline_s=config.host_deadline_s)
            attention = self.host_attention(self.pool)
            handoffs = tuple(HandOff(device, attention, config, channel) for channel in range(NUM_SUB_BATCHES))
        last_ids_S = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device.torch_device)
        self._shop = Workshop(
            device=device,
            model=model,
            store=self.store,
            sampling=SamplingState(config.max_num_seqs, config.shape.vocab_size, device.torch_device, config.seed),
            last_ids_S=last_ids_S,
            handoffs=handoffs,
            graphs=Graphs(device, model, self.store, last_ids_S, config),
            block_size=config.block_size,
        )
        self._sequences: dict[str, Sequence] = {}
        self._laps: dict[int, Lap] = {}
        self._whole_lap = Span(0, 0, config.shape.num_layers + 1, False)
        device.synchronise()  # everything above was enqueued outside `submit`

    def record_graphs(self) -> Recorded | None:
        """Record what later iterations replay (seconds on a GPU); `None` where there is nothing to record."""
        return self._shop.graphs.record()

    @property
    def recorded_rows(self) -> tuple[int, ...]:
        """Growing numbers of rows for which the linear work of laps with prompts or host rows is recorded; that of
        fewer rows is filled up."""
        return self._shop.graphs.stage_sizes

    @property
    def handoffs(self) -> tuple[HandOff, ...]:
        """The sub-batches' hand-offs; none without a host tier."""
        return self._shop.handoffs

    def host_attention(self, pool: _native.WorkerPool) -> _native.HostAttention:
        """The host tier's attention over the host pool."""
        shape = self.config.shape
        kv_LNK2X = torch.unflatten(self.store.host_LNX, 2, (shape.num_kv_heads, 2, -1))
        return host_attention(pool, kv_LNK2X, num_query_heads=shape.num_query_heads, head_dim=shape.head_dim)

    def add(self, request: Request) -> None:
        """Make a request known; its first rows may come in any later plan."""
        self._sequences[request.request_id] = Sequence(request, [])

    def remove(self, request_id: str) -> None:
        """Forget a request; laps in flight keep what they need of it."""
        self._sequences.pop(request_id, None)

    def launch(self, plan: IterationPlan, on_stage: OnStage | None = None) -> Launched:
        """Arm the workers and enqueue the iteration, without waiting for anything."""
        store, device = self.store, self.device
        earlier = store.earlier_copies()
        moves = Moves(plan.migrations, store.migrate(plan.migrations)) if plan.migrations else None
        for sub_batch in plan.begins:
            self._laps[sub_batch.index] = Lap(self._shop, sub_batch, self._sequences, moves)
        laps = {span.sub_batch: self._laps[span.sub_batch] for span in plan.spans}
        for sub_batch in plan.ends:
            del self._laps[sub_batch.index]
        lone_lap = laps[0] if plan.spans == (self._whole_lap,) else None
        recording = lone_lap.recording() if lone_lap is not None else None
        stages: tuple[Stage, ...] = ()
        if recording is None:
            stages = _stages(self.config.shape.num_layers, plan.spans)
            arm(stages, laps)

        def work() -> None:
            device.share_cores(with_workers=attends_on_host(plan.spans))
            if earlier is not None:
                device.wait_for(earlier)
            if lone_lap is not None and recording is not None:
                replay(lone_lap, recording, self.config.shape.num_layers, on_stage)
            else:
                issue(stages, laps, on_stage)

        return Launched(plan, laps, device.submit(work))

    def collect(self, launched: Launched) -> IterationResult:
        """Wait for an iteration and bring back what its ended laps sampled.

        A failure of the host tier comes back as `IterationResult.error`; `recover` must follow once everything that
        was launched is collected.
        """
        error: str | None = None
        try:
            launched.completion.wait()
        except HostAttentionError as failure:
            error = str(failure)
        if self.pool is not None:
            error = self.pool.error() or error
        elapsed_us = launched.completion.elapsed_us()
        if error is not None:
            return IterationResult(tokens=(), elapsed_us=elapsed_us, error=error)
        ended = [launched.laps[sub_batch.index] for sub_batch in launched.plan.ends]
        tokens = tuple(token for lap in ended for token in lap.tokens())
        for token in tokens:
            if token.token_id is not None and token.request_id in self._sequences:
                self._sequences[token.request_id].token_ids.append(token.token_id)
        return IterationResult(
            tokens=tokens,
            elapsed_us=elapsed_us,
            host_busy_us=sum(lap.native.busy_us for lap in ended if lap.native is not None),
            host_bytes=sum(lap.native.kv_bytes for lap in ended if lap.native is not None)
            * self.config.shape.num_layers,
        )

    def recover(self) -> None:
        """After a failed iteration, with nothing launched: drop the laps in flight and make the workers whole."""
        self._laps.clear()
        if self.pool is None:
            return
        for handoff in self._shop.handoffs:
            if not handoff.recover(self.config.host_deadline_s):
                raise HostAttentionError("the worker pool did not finish its armed layers; the engine cannot go on")
        self.pool.clear_error()

    def close(self) -> None:
        """End the workers and the device's streams."""
        if self.pool is not None:
            self.pool.close()
        self.device.close()


@lru_cache(maxsize=64)
def _stages(num_layers: int, spans: tuple[Span, ...]) -> tuple[Stage, ...]:
    """The program of an iteration; most iterations have the one of the iteration before."""
    return tuple(program(num_layers, spans))
