"""One lap in flight: its tensors, and what each stage of the program does to them.

Shape letters: T rows, C = H + 2K heads of a fused qkv row, H query heads, K kv heads, D head dim, E model dim,
B sampling rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from neoserve import _native
from neoserve.core.plan import Rows, SampledToken, SubBatch, TokenLogprobs
from neoserve.core.request import Request
from neoserve.device.base import Device, Exchange, PagedAttention
from neoserve.execution.handoff import HandOff
from neoserve.execution.inputs import LapInputs, lap_inputs
from neoserve.execution.kv_store import KVStore
from neoserve.execution.logprobs import Logprobs, token_logprobs
from neoserve.execution.sampling import SamplingState
from neoserve.models.decoder import Decoder, split_qkv


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every lap works with: the model, the memory, the device and the state of the sequences.

    last_ids_S: int64 on the device, the id that each slot's sequence sampled last.
    handoffs: one for each sub-batch index; none without a host tier.
    """

    device: Device
    model: Decoder
    store: KVStore
    sampling: SamplingState
    last_ids_S: torch.Tensor
    handoffs: tuple[HandOff, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request, and the tokens that it has so far; the executor appends to them."""

    request: Request
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt chunk's rows, on their way to the host."""

    request_id: str
    logprobs: Logprobs


class Lap:
    """One pass of a sub-batch through all layers.

    Made by the caller before anything is enqueued; `begin` and the stages run on the stream; `tokens` is read by the
    caller once the work that ended the lap is done.
    """

    def __init__(self, shop: Workshop, sub_batch: SubBatch, sequences: Mapping[str, Sequence]) -> None:
        self.sub_batch = sub_batch
        self._shop = shop
        self._requests = {rows.request_id: sequences[rows.request_id].request for rows in sub_batch.rows}
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
        empty = torch.empty(0)
        self._x_TE = self._residual_TE = self._qkv_TCD = self._attn_THD = empty
        self._token_ids_T = self._positions_T = self._decode_slots = self._sampling_rows_B = empty
        self._staging_ids: tuple[torch.Tensor, ...] = ()
        self._device_groups: list[tuple[slice, PagedAttention]] = []
        self._host_prefill: tuple[slice, PagedAttention] | None = None
        self._exchange: Exchange | None = None
        self._sampled_ids_B = empty
        self._logprobs: Logprobs | None = None
        self._prompt_logprobs: list[PromptLogprobs] = []

    def arm(self, layer: int) -> None:
        """Queue one layer of the host rows for the workers; by the caller, in program order."""
        assert self.native is not None
        self._shop.handoffs[self.sub_batch.index].arm(self.native, layer)

    def embed(self) -> None:
        """EMBED: bring the indices, plan the attention, and look the rows' token ids up."""
        shop, inputs = self._shop, self._inputs
        indices = shop.device.upload(inputs.indices)
        num_decodes = inputs.num_rows - inputs.num_prefill_rows
        prompt_ids, self._positions_T, self._decode_slots, self._sampling_rows_B = torch.split(
            indices, [inputs.num_prefill_rows, inputs.num_rows, num_decodes, len(inputs.sampling)]
        )
        self._token_ids_T = torch.cat([prompt_ids, shop.last_ids_S[self._decode_slots]])
        self._plan_attention()
        for slot, request, token_ids in self._beginning:
            shop.sampling.add(slot, request, token_ids)
        shape = shop.model.shape
        self._x_TE = shop.model.embed(self._token_ids_T)
        self._attn_THD = self._x_TE.new_empty((inputs.num_rows, shape.num_query_heads, shape.head_dim))

    def _plan_attention(self) -> None:
        shop, inputs = self._shop, self._inputs
        plan = shop.device.ops.plan_attention
        if inputs.device_prefill is not None:
            rows, batch = inputs.device_prefill
            self._device_groups.append((rows, plan(batch, decode=False)))
        if inputs.device_decode is not None:
            rows, batch = inputs.device_decode
            self._device_groups.append((rows, plan(batch, decode=True)))
        if inputs.host_prefill is not None and inputs.staging is not None:
            rows, batch = inputs.host_prefill
            self._host_prefill = (rows, plan(batch, decode=False))
            copies = inputs.staging
            self._staging_ids = tuple(
                map(
                    shop.device.upload,
                    (copies.load_host, copies.load_staging, copies.store_staging, copies.store_host),
                )
            )

    def pre(self, layer: int) -> None:
        """PRE: norm, q k v projection, rope."""
        decoder_layer = self._shop.model.layers[layer]
        residual = self._residual_TE if layer else None
        self._qkv_TCD, self._residual_TE = decoder_layer.before_attention(self._x_TE, residual, self._positions_T)

    def send(self) -> None:
        """SEND: q, k, v of the host rows to the workers, their attention output on its way back."""
        rows = self._inputs.host_decode
        handoff = self._shop.handoffs[self.sub_batch.index]
        self._exchange = handoff.send(self._qkv_TCD[rows], self._attn_THD[rows])

    def attend(self, layer: int) -> None:
        """ATTEND: append k, v of the prefill and device-decode rows, and attend for them."""
        store = self._shop.store
        for rows, attention in self._device_groups:
            self._attend(rows, attention, store.device_LN2KPD[layer])
        if self._host_prefill is None:
            return
        load_host, load_staging, store_staging, store_host = self._staging_ids
        if len(load_host):
            store.load_staging(layer, load_host, load_staging)
        self._attend(*self._host_prefill, store.staging(layer))
        store.store_staging(layer, store_staging, store_host)

    def _attend(self, rows: slice, attention: PagedAttention, kv_N2KPD: torch.Tensor) -> None:
        q_THD, k_TKD, v_TKD = split_qkv(self._qkv_TCD[rows], self._shop.model.shape)
        attention.append(k_TKD, v_TKD, kv_N2KPD)
        attention.run(q_THD, kv_N2KPD, self._attn_THD[rows])

    def recv(self) -> None:
        """RECV: attention output of the host rows is there."""
        assert self._exchange is not None
        self._exchange.finish()

    def post(self, layer: int) -> None:
        """POST: output projection and MLP."""
        decoder_layer = self._shop.model.layers[layer]
        self._x_TE, self._residual_TE = decoder_layer.after_attention(self._attn_THD, self._residual_TE)

    def head(self) -> None:
        """HEAD: logits of the rows that yield a token, and the tokens."""
        shop, inputs = self._shop, self._inputs
        self._prompt_rows_logprobs()
        if not inputs.sampling:
            return
        logits_BV = shop.model.head(self._x_TE, self._residual_TE, self._sampling_rows_B)
        batch = shop.sampling.batch(inputs.sampling)
        ids_B = shop.sampling.sample(logits_BV, batch)
        shop.last_ids_S[batch.slots_B] = ids_B
        self._sampled_ids_B = shop.device.download(ids_B)
        counts = [self._requests[r.request_id].params.logprobs for r in inputs.sampling]
        if any(count is not None for count in counts):
            found = token_logprobs(logits_BV, ids_B, max(count or 0 for count in counts))
            self._logprobs = found.to_host(shop.device.download)

    def _prompt_rows_logprobs(self) -> None:
        """Log-probabilities of the prompts' own tokens, a prompt at a time: row i says what follows token i."""
        first_row = 0
        for rows in self.sub_batch.prefill:
            request = self._requests[rows.request_id]
            targets = request.prompt_token_ids[rows.start + 1 : rows.length + 1]
            if request.params.prompt_logprobs is not None and targets:
                device = self._x_TE.device
                row_ids = torch.arange(first_row, first_row + len(targets), device=device)
                logits_TV = self._shop.model.head(self._x_TE, self._residual_TE, row_ids)
                ids_T = torch.tensor(targets, device=device)
                found = token_logprobs(logits_TV, ids_T, request.params.prompt_logprobs)
                found = found.to_host(self._shop.device.download)
                self._prompt_logprobs.append(PromptLogprobs(rows.request_id, found))
            first_row += rows.count

    def tokens(self) -> tuple[SampledToken, ...]:
        """One entry for each `Rows` of the sub-batch, in order; the lap's work must be done."""
        prompt = {found.request_id: found.logprobs.rows() for found in self._prompt_logprobs}
        ids = self._sampled_ids_B.tolist()
        logprobs = self._logprobs.rows() if self._logprobs is not None else ()
        sampled = {rows.request_id: index for index, rows in enumerate(self._inputs.sampling)}

        def token(rows: Rows) -> SampledToken:
            request_prompt = prompt.get(rows.request_id, ())
            index = sampled.get(rows.request_id)
            if index is None:
                return SampledToken(rows.request_id, None, None, request_prompt)
            chosen = self._chosen_logprobs(logprobs, index, rows)
            return SampledToken(rows.request_id, int(ids[index]), chosen, request_prompt)

        return tuple(map(token, self.sub_batch.rows))

    def _chosen_logprobs(self, logprobs: tuple[TokenLogprobs, ...], index: int, rows: Rows) -> TokenLogprobs | None:
        count = self._requests[rows.request_id].params.logprobs
        if count is None:
            return None
        found = logprobs[index]
        return TokenLogprobs(found.token_id, found.logprob, found.rank, found.top[:count])
