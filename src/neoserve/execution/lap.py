"""One lap in flight: its tensors, and what each stage of the program does to them.

Shape letters: T rows, C = H + 2K heads of a fused qkv row, H query heads, K kv heads, D head dim, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial

import torch

from neoserve import _native
from neoserve.core.plan import SampledToken, SubBatch
from neoserve.core.request import Request
from neoserve.device.base import Device, Exchange, PagedAttention
from neoserve.execution.graphs import Graphs, LapGraphs
from neoserve.execution.handoff import HandOff
from neoserve.execution.head import Head
from neoserve.execution.inputs import LapInputs, lap_inputs
from neoserve.execution.kv_store import KVStore
from neoserve.execution.linear import EagerLinear, Linear
from neoserve.execution.moves import Moves
from neoserve.execution.sampling import SamplingState
from neoserve.execution.staging import StagedPrefill
from neoserve.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every lap works with: the model, the memory, the device and the state of the sequences.

    last_ids_S: int64 on the device, the id that each slot's sequence sampled last.
    handoffs: one for each sub-batch index; none without a host tier.
    graphs: work that was recorded.
    """

    device: Device
    model: Decoder
    store: KVStore
    sampling: SamplingState
    last_ids_S: torch.Tensor
    handoffs: tuple[HandOff, ...]
    graphs: Graphs
    block_size: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request, and the tokens that it has so far; the executor appends to them."""

    request: Request
    token_ids: list[int]


class Lap:
    """One pass of a sub-batch through all layers.

    Made by the caller before anything is enqueued; the stages (or `replay`, then `head`) run on the stream; `tokens`
    is read by the caller once the work that ended the lap is done.
    """

    def __init__(
        self, shop: Workshop, sub_batch: SubBatch, sequences: Mapping[str, Sequence], moves: Moves | None
    ) -> None:
        self.sub_batch = sub_batch
        self._shop = shop
        self._moves = moves
        # A sequence begins with its first chunk, and again with the chunk after a lap that was lost.
        self._beginning = [
            (rows.slot, sequences[rows.request_id].request, tuple(sequences[rows.request_id].token_ids))
            for rows in sub_batch.prefill
            if rows.start == 0 or rows.num_generated
        ]
        self._inputs: LapInputs = lap_inputs(sub_batch, shop.block_size)
        self.native: _native.Lap | None = None
        if sub_batch.host_decode:
            self.native = shop.handoffs[sub_batch.index].begin(sub_batch.host_decode)
        self._linear: Linear = EagerLinear(shop.model)
        self._attends: list[Callable[[int], None]] = []
        self._exchange: Exchange | None = None
        self._sampling_rows: torch.Tensor | None = None  # `None`: the first ones
        requests = {rows.request_id: sequences[rows.request_id].request for rows in sub_batch.rows}
        self._head = Head(shop.device, shop.model, sub_batch, requests)

    def recording(self) -> LapGraphs | None:
        """The recording that makes the lap but for its HEAD, if there is one."""
        if self.sub_batch.prefill or self.sub_batch.host_decode:
            return None
        return self._shop.graphs.lap(len(self.sub_batch.device_decode))

    def replay(self, recording: LapGraphs) -> None:
        """All stages before HEAD at once, by what `recording` returned."""
        assert self._inputs.device_decode is not None
        self._await_moves()
        _, positions, slots = self._bring_indices()
        _, batch = self._inputs.device_decode
        self._linear = recording.replay(batch, slots, positions)

    def arm(self, layer: int) -> None:
        """Queue one layer of the host rows for the workers; by the caller, in program order."""
        assert self.native is not None
        self._shop.handoffs[self.sub_batch.index].arm(self.native, layer)

    def embed(self) -> None:
        """EMBED: bring the indices, plan the attention, and look the rows' token ids up.

        A lap of device decodes may be recorded in steps; they hold its attention, so ATTEND has nothing to do then.
        """
        shop, inputs = self._shop, self._inputs
        self._await_moves()
        prompt_ids, positions, slots = self._bring_indices()
        recording = self.recording() if self.sub_batch.index == 0 else None  # one such lap is in flight at a time
        if recording is not None and inputs.device_decode is not None:
            _, batch = inputs.device_decode
            steps = recording.steps(batch, slots, positions)
            if steps is not None:
                self._linear = steps
                return
        self._linear = shop.graphs.linear(self.sub_batch.index, inputs.num_rows) or self._linear
        self._plan_attention()
        for slot, request, token_ids in self._beginning:
            shop.sampling.add(slot, request, token_ids)
        self._linear.embed(torch.cat([prompt_ids, shop.last_ids_S[slots]]), positions)

    def _await_moves(self) -> None:
        if self._moves is not None:
            self._moves.hold(self._shop.device, self.sub_batch)

    def _bring_indices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompt token ids, the rows' positions and the decodes' slots, on the device."""
        inputs = self._inputs
        num_decodes = inputs.num_rows - inputs.num_prefill_rows
        sizes = [inputs.num_prefill_rows, inputs.num_rows, num_decodes, len(inputs.sampling)]
        prompt_ids, positions, slots, sampling = torch.split(self._shop.device.upload(inputs.indices), sizes)
        self._sampling_rows = sampling if len(sampling) < inputs.num_rows else None
        return prompt_ids, positions, slots

    def _plan_attention(self) -> None:
        shop, inputs = self._shop, self._inputs
        plan = shop.device.ops.plan_attention
        groups = []
        if inputs.device_prefill is not None:
            rows, batch = inputs.device_prefill
            groups.append((rows, plan(batch, decode=False)))
        if inputs.device_decode is not None:
            rows, batch = inputs.device_decode
            groups.append((rows, plan(batch, decode=True)))
        if groups:
            self._attends.append(self._for_layers(groups, shop.store.device_LN2KPD))
        if inputs.host_prefill is not None and inputs.staging is not None:
            rows, batch = inputs.host_prefill
            attend = self._for_layers([(rows, plan(batch, decode=False))], shop.store.staging_LN2KPD)
            self._attends.append(StagedPrefill(shop.device, shop.store, attend, inputs.staging).attend)

    def _for_layers(
        self, groups: Ordered[tuple[slice, PagedAttention]], kv_LN2KPD: torch.Tensor
    ) -> Callable[[int], None]:
        """The attention of groups of rows, by layer of the KV."""
        work = partial(_attend, self._linear, groups)
        if self._linear.stays:
            return self._shop.device.for_layers(work, kv_LN2KPD)
        return lambda layer: work(kv_LN2KPD[layer])

    def pre(self, layer: int) -> None:
        """PRE: norm, q k v projection, rope."""
        self._linear.pre(layer)

    def send(self) -> None:
        """SEND: q, k, v of the host rows to the workers, their attention output on its way back."""
        rows, handoff = self._inputs.host_decode, self._shop.handoffs[self.sub_batch.index]
        if self._exchange is None:
            self._exchange = handoff.exchange(self._linear.qkv_TCD[rows], self._linear.attn_THD[rows])
        handoff.send(self._exchange)

    def attend(self, layer: int) -> None:
        """ATTEND: append k, v of the prefill and device-decode rows, and attend for them."""
        for attend in self._attends:
            attend(layer)

    def recv(self) -> None:
        """RECV: attention output of the host rows is there."""
        assert self._exchange is not None
        self._exchange.finish()
        if not self._linear.stays:
            self._exchange = None

    def post(self, layer: int) -> None:
        """POST: output projection and MLP; in the last layer, of the rows that the HEAD reads."""
        if layer < self._shop.model.shape.num_layers - 1 or self._head.reads_prompts:
            self._linear.post(layer)
        elif self._inputs.sampling:
            self._linear.post(layer, self._sampling_rows)
            self._sampling_rows = None

    def head(self) -> None:
        """HEAD: logits of the rows that yield a token, and the tokens."""
        shop, linear = self._shop, self._linear
        self._head.run(
            linear.x_TE,
            self._inputs.sampling,
            self._sampling_rows,
            shop.sampling,
            shop.last_ids_S,
        )
        # The lap lives until its tokens are collected; its rows' memory is the next lap's.
        self._linear = EagerLinear(shop.model)
        self._attends = []
        self._exchange = None

    def tokens(self) -> tuple[SampledToken, ...]:
        """One entry for each `Rows` of the sub-batch, in order; the lap's work must be done."""
        return self._head.tokens(self._inputs.sampling)


def _attend(linear: Linear, groups: Ordered[tuple[slice, PagedAttention]], kv_N2KPD: torch.Tensor) -> None:
    """Append k, v of the groups' rows to one layer's KV, and attend for them."""
    for rows, attention in groups:
        q_THD, k_TKD, v_TKD, out_THD = linear.attention_rows(rows)
        attention.run(q_THD, k_TKD, v_TKD, kv_N2KPD, out_THD)
