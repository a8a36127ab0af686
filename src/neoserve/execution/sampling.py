"""From logits to tokens. Meanings and order are vLLM's:

    logit_bias and min_tokens -> repetition, frequency, presence penalties -> (temperature 0: the likeliest)
    -> temperature -> min_p -> top_k -> top_p -> draw

What a lap needs is decided on the host (`SamplingState.batch`), so `sample` waits on nothing, does only what some row
asks for, and is a bare argmax when every row is plainly greedy.

Shape letters: B rows that are sampled, S slots, V vocabulary, W ids that a row adds to, n the candidates that are
sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from neoserve.core.plan import Rows
from neoserve.core.request import Request
from neoserve.execution.noise import gumbel_noise, mix64, row_keys

MIN_TEMPERATURE = 1e-5  # below it, dividing could overflow
DRAW_ELEMENTS = 2**21  # rows are drawn in groups of about so many logits, to bound scratch memory at 128 MiB
_IN_PROMPT, _GENERATED, _MOST = 1, 2, 2**15 - 2
"""What `SamplingState` keeps of a token: a bit, so much for each time that it was generated, and where that ends."""

_SLOT = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("min_tokens", np.int64),
    ]
)


@dataclass(frozen=True, slots=True)
class Additions:
    """What is added to logits: biases, and minus infinity for stop ids before min_tokens. Short rows add 0 to id 0."""

    ids_BW: torch.Tensor
    values_BW: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of rows, neutral (1, 0, 0) where a row has none."""

    repetition_B1: torch.Tensor
    presence_B1: torch.Tensor
    frequency_B1: torch.Tensor

    def rows(self, rows: slice) -> Penalties:
        """Of some rows."""
        return Penalties(self.repetition_B1[rows], self.presence_B1[rows], self.frequency_B1[rows])


@dataclass(frozen=True, slots=True)
class Draw:
    """How tokens are drawn.

    keys_B: int64, of the rows' noise. columns_B5: float32, for each row: the weight of the noise (0 for a greedy row,
    so that the likeliest token wins; else 1), temperature, log of min_p, top_k and top_p; neutral (-inf, V, 2) where
    a row does not limit its candidates so. sorts: some row has a top_k or top_p, and `num_candidates` is the largest
    top_k. has_min_p: some row has a min_p.
    """

    keys_B: torch.Tensor
    columns_B5: torch.Tensor
    sorts: bool
    num_candidates: int
    has_min_p: bool

    def rows(self, rows: slice) -> Draw:
        """Of some rows."""
        return replace(self, keys_B=self.keys_B[rows], columns_B5=self.columns_B5[rows])


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What sampling one lap takes, on the device; a part is `None` when no row needs it.

    slots_B: int64, the rows' slots.
    """

    slots_B: torch.Tensor
    additions: Additions | None
    penalties: Penalties | None
    draw: Draw | None


class SamplingState:
    """The sampling parameters of the sequences in each slot, and on the device what penalties look at: `tokens_SV`,
    int16, whether each token is in the prompt and how often it was generated.

    Used from the device's stream only. seed: of the engine; requests without a seed of their own get one derived from
    it and from how many came before.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots = np.zeros(max_num_seqs, _SLOT)
        self._biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._stop_ids: dict[int, np.ndarray] = {}
        self._engine_seed = _seed64(seed)
        self._num_unseeded = 0
        # Allocated for the first request with penalties, which most engines never see.
        self._tokens_SV: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the device that is kept from the first request with penalties on."""
        return self._tokens_SV.nbytes if self._tokens_SV is not None else 0

    def add(self, slot: int, request: Request, generated_ids: Sequence[int] = ()) -> None:
        """Begin a sequence in `slot`, whatever was there before. `generated_ids`: its output so far, if any.

        Ids outside the vocabulary in logit_bias and stop ids have no effect.
        """
        params = request.params
        self._slots[slot] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.top_k,
            self._next_seed() if params.seed is None else _seed64(params.seed),
            params.min_tokens,
        )
        self._biases.pop(slot, None)
        self._stop_ids.pop(slot, None)
        if params.logit_bias:
            ids = np.array(list(params.logit_bias), np.int64)
            values = np.array(list(params.logit_bias.values()), np.float32)
            self._biases[slot] = (ids[self._in_vocabulary(ids)], values[self._in_vocabulary(ids)])
        if params.min_tokens:
            ids = np.array(request.stop_ids, np.int64)
            self._stop_ids[slot] = ids[self._in_vocabulary(ids)]
        if _has_penalties(self._slots[slot : slot + 1]):
            self._begin_counts(slot, request.prompt_token_ids, generated_ids)

    def batch(self, rows: Sequence[Rows]) -> SamplingBatch:
        """What sampling takes for `rows`, in the order of the logits; every one of them samples."""
        slots = np.array([row.slot for row in rows], np.int64)
        num_generated = np.array([row.num_generated for row in rows], np.int64)
        params = self._slots[slots]
        return SamplingBatch(
            slots_B=self._upload(slots),
            additions=self._additions(slots, num_generated),
            penalties=self._penalties(params),
            draw=self._draw(params, num_generated),
        )

    def sample(self, logits_BV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """`ids_B`, int64, of float32 logits, which stay as they are. Counts the tokens where a row has penalties."""
        if batch.additions is not None:
            logits_BV = logits_BV.scatter_add(1, batch.additions.ids_BW, batch.additions.values_BW)
        if batch.penalties is None and batch.draw is None:
            return logits_BV.argmax(-1)
        ids_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
        group = max(1, DRAW_ELEMENTS // logits_BV.shape[1])
        for first in range(0, len(logits_BV), group):
            rows = slice(first, first + group)
            ids_B[rows] = self._sample_rows(logits_BV[rows], batch, rows)
        return ids_B

    def _sample_rows(self, logits_BV: torch.Tensor, batch: SamplingBatch, rows: slice) -> torch.Tensor:
        """`ids_B` of some rows of a batch, with scratch memory in proportion to them."""
        places = batch.slots_B[rows]
        if batch.penalties is not None:
            assert self._tokens_SV is not None
            logits_BV = penalise(logits_BV, self._tokens_SV[places], batch.penalties.rows(rows))
        ids_B = logits_BV.argmax(-1) if batch.draw is None else draw(logits_BV, batch.draw.rows(rows))
        if batch.penalties is not None and self._tokens_SV is not None:
            tokens_B = self._tokens_SV[places, ids_B]
            self._tokens_SV[places, ids_B] = torch.where(tokens_B < _MOST, tokens_B + _GENERATED, tokens_B)
        return ids_B

    def _next_seed(self) -> int:
        self._num_unseeded += 1
        return int(mix64(mix64(np.array([self._engine_seed], np.uint64)) + np.uint64(self._num_unseeded))[0])

    def _in_vocabulary(self, ids: np.ndarray) -> np.ndarray:
        return (ids >= 0) & (ids < self._vocab_size)

    def _begin_counts(self, slot: int, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        if self._tokens_SV is None:
            size = (len(self._slots), self._vocab_size)
            self._tokens_SV = torch.zeros(size, dtype=torch.int16, device=self._device)
        ids, counts = np.unique(np.array(generated_ids, np.int64), return_counts=True)
        tokens_V = self._tokens_SV[slot].zero_()
        tokens_V[self._upload(ids)] = self._upload(np.minimum(_GENERATED * counts, _MOST).astype(np.int16))
        tokens_V[self._upload(np.unique(np.array(prompt_ids, np.int64)))] += _IN_PROMPT

    def _additions(self, slots: np.ndarray, num_generated: np.ndarray) -> Additions | None:
        if not (self._biases or self._stop_ids):
            return None
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for slot, count in zip(slots.tolist(), num_generated.tolist(), strict=True):
            banned = self._stop_ids.get(slot)
            if banned is None or count >= self._slots[slot]["min_tokens"]:
                banned = np.empty(0, np.int64)
            ids, values = self._biases.get(slot, (np.empty(0, np.int64), np.empty(0, np.float32)))
            minus_infinity = np.full(len(banned), -np.inf, np.float32)
            rows.append((np.concatenate((ids, banned)), np.concatenate((values, minus_infinity))))
        width = max(len(ids) for ids, _ in rows)
        if width == 0:
            return None
        ids_BW, values_BW = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.float32)
        for row, (ids, values) in enumerate(rows):
            ids_BW[row, : len(ids)], values_BW[row, : len(ids)] = ids, values
        return Additions(self._upload(ids_BW), self._upload(values_BW))

    def _penalties(self, params: np.ndarray) -> Penalties | None:
        if not _has_penalties(params):
            return None
        columns = np.stack([params["repetition"], params["presence"], params["frequency"]])
        return Penalties(*self._upload(columns).unsqueeze(-1).unbind())

    def _draw(self, params: np.ndarray, num_generated: np.ndarray) -> Draw | None:
        noisy = params["temperature"] > 0
        if not noisy.any():
            return None
        # A greedy row is limited to its likeliest token already: it must not make others' candidates more.
        top_k = np.where(noisy, params["top_k"], 1)
        top_k = np.where(top_k > 0, np.minimum(top_k, self._vocab_size), self._vocab_size)
        top_p = np.where(noisy & (params["top_p"] < 1), params["top_p"], np.float32(2))
        min_p_log = np.full(len(params), -np.inf, np.float32)
        np.log(params["min_p"], out=min_p_log, where=noisy & (params["min_p"] > 0))
        temperature = np.where(noisy, np.maximum(params["temperature"], MIN_TEMPERATURE), 1)
        columns = np.stack([noisy, temperature, min_p_log, top_k, top_p], axis=1).astype(np.float32)
        return Draw(
            keys_B=self._upload(row_keys(params["seed"], num_generated)),
            columns_B5=self._upload(columns),
            sorts=bool((top_p < 1).any() or (top_k[noisy] < self._vocab_size).any()),
            num_candidates=int(top_k.max()),
            has_min_p=bool(np.isfinite(min_p_log).any()),
        )

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _has_penalties(params: np.ndarray) -> bool:
    return bool(((params["repetition"] != 1) | (params["presence"] != 0) | (params["frequency"] != 0)).any())


def _seed64(seed: int) -> int:
    """Any integer as a uint64: Python's are signed and have no end."""
    return seed % 2**64


def penalise(logits_BV: torch.Tensor, tokens_BV: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Logits with penalties: repetition for tokens of prompt or output, the others for tokens of the output only."""
    generated_BV = tokens_BV // _GENERATED
    was_generated_BV = generated_BV > 0
    repetition_B1 = penalties.repetition_B1
    repeated_BV = torch.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = torch.where(tokens_BV > 0, repeated_BV, logits_BV)
    return logits_BV - penalties.frequency_B1 * generated_BV - penalties.presence_B1 * was_generated_BV


def draw(logits_BV: torch.Tensor, how: Draw) -> torch.Tensor:
    """`ids_B` drawn from the softmax of each row's candidates: the argmax of their scores with Gumbel noise."""
    noise_weight_B1, temperature_B1, *limits = how.columns_B5.chunk(5, dim=1)
    scores_BV = restrict(logits_BV / temperature_B1, how, *limits)
    scores_BV += noise_weight_B1 * gumbel_noise(how.keys_B, logits_BV.shape[1])
    return scores_BV.argmax(-1)


def restrict(
    scores_BV: torch.Tensor, how: Draw, min_p_log_B1: torch.Tensor, top_k_B1: torch.Tensor, top_p_B1: torch.Tensor
) -> torch.Tensor:
    """The scores with -inf for all but the candidates; tokens that tie with the last candidate are candidates too."""
    if not how.sorts:
        if not how.has_min_p:
            return scores_BV
        return scores_BV.masked_fill(scores_BV < scores_BV.amax(-1, keepdim=True) + min_p_log_B1, -torch.inf)
    sorted_Bn = scores_BV.topk(how.num_candidates, dim=-1).values
    rank_n = torch.arange(how.num_candidates, device=scores_BV.device)
    dropped_Bn = (sorted_Bn < sorted_Bn[:, :1] + min_p_log_B1) | (rank_n >= top_k_B1)
    probability_Bn = sorted_Bn.masked_fill(dropped_Bn, -torch.inf).softmax(-1)
    likelier_Bn = probability_Bn.cumsum(-1) - probability_Bn  # the mass of all tokens before this one
    dropped_Bn |= likelier_Bn >= top_p_B1
    floor_B1 = sorted_Bn.masked_fill(dropped_Bn, torch.inf).amin(-1, keepdim=True)
    return scores_BV.masked_fill(scores_BV < floor_B1, -torch.inf)
