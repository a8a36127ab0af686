"""HEAD: from the last layer's rows to tokens and log-probabilities, in groups of rows that bound the logits' memory.

Shape letters: T rows, E model dim, B rows of a group that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from neoserve.core.plan import Rows, SampledToken, SubBatch, TokenLogprobs
from neoserve.core.request import Request
from neoserve.device.base import Device
from neoserve.execution.logprobs import Logprobs, token_logprobs
from neoserve.execution.sampling import SamplingState
from neoserve.models.decoder import Decoder

GROUP_ROWS = 64


class Head:
    """The HEAD of one lap. `run` enqueues it on the stream; `tokens` is read by the caller once that is done.

    reads_prompts: whether it reads rows of prompts that yield no token.
    """

    def __init__(self, device: Device, model: Decoder, sub_batch: SubBatch, requests: Mapping[str, Request]) -> None:
        self._device = device
        self._model = model
        self._sub_batch = sub_batch
        self._params = {request_id: request.params for request_id, request in requests.items()}
        self._prompts = {request_id: request.prompt_token_ids for request_id, request in requests.items()}
        asked = [self._params[rows.request_id].prompt_logprobs for rows in sub_batch.prefill]
        self.reads_prompts = any(count is not None for count in asked)
        self._ids: list[torch.Tensor] = []
        self._logprobs: list[Logprobs | None] = []
        self._prompt_logprobs: dict[str, list[Logprobs]] = {}

    def run(
        self,
        x_TE: torch.Tensor,
        sampling: Sequence[Rows],
        sampling_rows: torch.Tensor | None,
        state: SamplingState,
        last_ids_S: torch.Tensor,
    ) -> None:
        """Sample for `sampling`, from one row each, into `last_ids_S`.

        sampling_rows: those rows, int64, on the device; `None`: the first ones.
        """
        self._prompt_rows(x_TE)
        for first in range(0, len(sampling), GROUP_ROWS):
            group = sampling[first : first + GROUP_ROWS]
            which = slice(first, first + len(group))
            rows = (x_TE[which],) if sampling_rows is None else (x_TE, sampling_rows[which])
            logits_BV = self._model.head(*rows)
            batch = state.batch(group)
            ids_B = state.sample(logits_BV, batch)
            last_ids_S[batch.slots_B] = ids_B
            self._ids.append(self._device.download(ids_B))
            counts = [self._params[rows.request_id].logprobs for rows in group]
            found = None
            if any(count is not None for count in counts):
                found = token_logprobs(logits_BV, ids_B, max(count or 0 for count in counts))
                found = found.to_host(self._device.download)
            self._logprobs.append(found)

    def _prompt_rows(self, x_TE: torch.Tensor) -> None:
        """Log-probabilities of the prompts' own tokens: row i says what follows token i."""
        first_row = 0
        for rows in self._sub_batch.prefill:
            num_top = self._params[rows.request_id].prompt_logprobs
            targets = self._prompts[rows.request_id][rows.start + 1 : rows.length + 1]
            if num_top is not None:
                row_ids = np.arange(first_row, first_row + len(targets), dtype=np.int64)
                groups = range(0, len(targets), GROUP_ROWS)
                self._prompt_logprobs[rows.request_id] = [
                    self._prompt_group(x_TE, row_ids[group], targets[group], num_top)
                    for group in (slice(first, first + GROUP_ROWS) for first in groups)
                ]
            first_row += rows.count

    def _prompt_group(
        self,
        x_TE: torch.Tensor,
        row_ids: np.ndarray,
        targets: Sequence[int],
        num_top: int,
    ) -> Logprobs:
        upload = self._device.upload
        logits_BV = self._model.head(x_TE, upload(row_ids))
        found = token_logprobs(logits_BV, upload(np.array(targets, dtype=np.int64)), num_top)
        return found.to_host(self._device.download)

    def tokens(self, sampling: Sequence[Rows]) -> tuple[SampledToken, ...]:
        """One entry for each `Rows` of the sub-batch, in order."""
        ids = [token_id for group in self._ids for token_id in group.tolist()]
        logprobs: list[TokenLogprobs | None] = []
        for group_ids, group in zip(self._ids, self._logprobs, strict=True):
            logprobs += [None] * len(group_ids) if group is None else group.rows()
        sampled = {rows.request_id: index for index, rows in enumerate(sampling)}

        def token(rows: Rows) -> SampledToken:
            groups = self._prompt_logprobs.get(rows.request_id, ())
            prompt = tuple(position for group in groups for position in group.rows())
            index = sampled.get(rows.request_id)
            if index is None:
                return SampledToken(rows.request_id, None, None, prompt)
            return SampledToken(rows.request_id, ids[index], self._chosen(logprobs[index], rows), prompt)

        return tuple(map(token, self._sub_batch.rows))

    def _chosen(self, found: TokenLogprobs | None, rows: Rows) -> TokenLogprobs | None:
        """What the request asked for of what its group found."""
        count = self._params[rows.request_id].logprobs
        if count is None or found is None:
            return None
        return TokenLogprobs(found.token_id, found.logprob, found.rank, found.top[:count])
