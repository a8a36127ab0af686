"""What a user asks for and what comes back: sampling parameters, requests, outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from neoserve.core.errors import InvalidRequestError
from neoserve.core.plan import TokenLogprobs

MAX_N = 128
MAX_STOP = 16
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "abort", "error"]


def _check(condition: bool, param: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{param} is {value!r}; expected {expected}", param)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; names, defaults and meanings are vLLM's.

    temperature 0 is greedy. top_k 0 or -1 keeps all tokens. `seed` makes a request's tokens depend on nothing but
    the request. `logprobs` / `prompt_logprobs`: how many top log-probabilities to return besides the token's own;
    `None` for none at all. Raises `InvalidRequestError` for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(isinstance(value, int | float) and math.isfinite(value), name, value, "a finite number")
        _check(1 <= self.n <= MAX_N, "n", self.n, f"1 to {MAX_N}")
        _check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        _check(-1 <= self.top_k < 2**31, "top_k", self.top_k, "-1 or 0 (all tokens) or at least 1, less than 2**31")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS}")
        for bias in self.logit_bias.values():
            _check(-100 <= bias <= 100, "logit_bias", bias, "values from -100 to 100")
        _check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "0 or more, less than 2**63")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        _check(len(self.stop) <= MAX_STOP, "stop", len(self.stop), f"at most {MAX_STOP} strings")
        _check(all(self.stop), "stop", self.stop, "strings that are not empty")
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            len(self.stop_token_ids),
            f"at most {MAX_STOP_TOKEN_IDS}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"0 to {MAX_LOGPROBS}")

    def for_choice(self, index: int) -> SamplingParams:
        """The parameters of choice `index` of n: n is 1, and a given seed differs for each choice."""
        if self.n == 1:
            return self
        return replace(self, n=1, seed=None if self.seed is None else self.seed + index)


@dataclass(frozen=True)
class Request:
    """One sequence to generate, as the engine core takes it; a user's request with n > 1 is n of these.

    prompt_token_ids holds at least one id. `params.max_tokens` is decided (never `None`) and `params.n` is 1.
    stop_ids ends the sequence: eos ids of the model (none with ignore_eos) and `params.stop_token_ids`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    arrival_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one iteration did for one request: its new tokens and whether it is finished.

    stop_id: the id that ended it, when `finish_reason` is "stop". num_host_tokens: how many of `token_ids` the host
    tier decoded. error: why, when `finish_reason` is "error".
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    num_host_tokens: int = 0
    error: str | None = None
