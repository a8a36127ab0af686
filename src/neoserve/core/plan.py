"""What the scheduler decides, as frozen values that the executor carries out.

Words: a *row* is one token's line through the linear layers; a *sub-batch* is the rows that pass through them
together; a *lap* is one pass of a sub-batch through all layers. An iteration begins some laps, advances all that
are in flight (`Span`), and ends some: the rows of an ended lap have a token each.
"""

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from neoserve.core.program import Span

BlockIds = npt.NDArray[np.int32]
"""Block ids in order: a read-only view of a table that only grows, so a plan costs nothing per block of context."""


class Tier(enum.Enum):
    """Where a sequence's KV lives and its decode attention is computed."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence's rows in a lap.

    slot: index of the sequence in per-sequence device state (last sampled id, penalties), < max_num_seqs.
    start: tokens of the sequence whose KV is already in the pool; the rows' positions are [start, start + count).
    token_ids: the rows' tokens for a prefill chunk; `None` for a decode row, whose token is the id that the
        sequence's last lap sampled and which is still on the device.
    block_ids: the sequence's block table in its tier's pool, exactly the blocks that hold start + count tokens.
    staging_block_ids: for a prefill chunk of a HOST sequence, as many blocks of the one-layer staging area; empty
        otherwise.
    samples: whether the last row yields a token (false for all but the last chunk of a prompt).
    num_generated: tokens that the sequence has generated before the one that this lap samples, in flight included.
    continues: the rows go on in sub-batch 1 where those of the same sequence stop in sub-batch 0, in laps that run
        whole in one iteration; a HOST sequence's staging blocks then hold the tokens before `start` already.
    """

    request_id: str
    slot: int
    tier: Tier
    start: int
    count: int
    token_ids: tuple[int, ...] | None
    block_ids: BlockIds = field(compare=False)
    staging_block_ids: tuple[int, ...]
    samples: bool
    num_generated: int
    continues: bool = False

    @property
    def is_prefill(self) -> bool:
        return self.token_ids is not None

    @property
    def length(self) -> int:
        """Tokens in the KV once this lap is done."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class SubBatch:
    """The rows of one lap, in the order in which they lie in the tensors.

    index: 0 or 1, which of the executor's two sets of buffers and hand-off slots the lap uses.
    lap: number of the lap, growing over the engine's life.
    """

    index: int
    lap: int
    prefill: tuple[Rows, ...]
    device_decode: tuple[Rows, ...]
    host_decode: tuple[Rows, ...]

    @property
    def rows(self) -> tuple[Rows, ...]:
        return self.prefill + self.device_decode + self.host_decode

    @property
    def num_rows(self) -> int:
        return sum(rows.count for rows in self.rows)


@dataclass(frozen=True, slots=True)
class Migration:
    """Move `num_tokens` tokens of a sequence's KV, all layers, between the pools before any lap of the iteration."""

    request_id: str
    source: Tier
    source_block_ids: BlockIds = field(compare=False)
    target_block_ids: BlockIds = field(compare=False)
    num_tokens: int


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration.

    begins: the laps that begin; their buffers (by `SubBatch.index`) are free by now.
    spans: what every lap in flight advances, begun now or earlier; the argument of `core.program.program`.
    ends: laps whose last step is in this iteration, in order of sub-batch index.
    predicted_us: the cost model's price of the program.
    """

    iteration: int
    begins: tuple[SubBatch, ...]
    spans: tuple[Span, ...]
    ends: tuple[SubBatch, ...]
    migrations: tuple[Migration, ...]
    predicted_us: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, its rank (1 = likeliest), and the top ones in order."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the lap of one sequence yielded. `prompt_logprobs` are those of the chunk's rows, when asked for:
    row i gives the log-probability of prompt token start + i + 1."""

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class IterationResult:
    """What `Executor.collect` brings back.

    tokens: one entry for each `Rows` of the laps that ended, in the order of `IterationPlan.ends`.
    elapsed_us: from the first stage's start to the last one's end on the device.
    host_busy_us / host_bytes: time in which the worker pool attended, and the KV bytes that it read.
    error: set when host attention failed; then `tokens` is empty and the iteration's laps are lost.
    """

    tokens: tuple[SampledToken, ...]
    elapsed_us: float
    host_busy_us: float = 0.0
    host_bytes: int = 0
    error: str | None = None
