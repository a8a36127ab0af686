"""Log-probabilities of chosen tokens and of the likeliest ones, of the raw distribution: before penalties, biases and
temperature, as vLLM gives them.

Shape letters: B rows, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from neoserve.core.plan import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One position a row: the token, its log-probability and rank (1: likeliest), and the k likeliest in order."""

    ids_B: torch.Tensor
    logprob_B: torch.Tensor
    rank_B: torch.Tensor
    top_ids_Bk: torch.Tensor
    top_logprobs_Bk: torch.Tensor

    def to_host(self, download: Callable[[torch.Tensor], torch.Tensor]) -> Logprobs:
        """The same on the host, each tensor brought there by `download`."""
        return Logprobs(
            download(self.ids_B),
            download(self.logprob_B),
            download(self.rank_B),
            download(self.top_ids_Bk),
            download(self.top_logprobs_Bk),
        )

    def rows(self) -> tuple[TokenLogprobs, ...]:
        """Plain values, once the tensors are on the host."""
        columns = (self.ids_B, self.logprob_B, self.rank_B, self.top_ids_Bk, self.top_logprobs_Bk)
        return tuple(
            TokenLogprobs(token_id, logprob, rank, tuple(zip(top_ids, top_logprobs, strict=True)))
            for token_id, logprob, rank, top_ids, top_logprobs in zip(*(c.tolist() for c in columns), strict=True)
        )


def token_logprobs(logits_BV: torch.Tensor, ids_B: torch.Tensor, k: int) -> Logprobs:
    """Of raw float32 logits and chosen ids (int64), with the `k` likeliest tokens (k may be 0). Waits on nothing."""
    logprobs_BV = logits_BV.log_softmax(-1)
    logprob_B1 = logprobs_BV.gather(1, ids_B.unsqueeze(1))
    rank_B = (logprobs_BV > logprob_B1).sum(-1) + 1
    top = logprobs_BV.topk(k, dim=-1)
    return Logprobs(ids_B, logprob_B1.squeeze(1), rank_B, top.indices, top.values)
