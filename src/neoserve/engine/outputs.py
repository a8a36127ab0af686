"""What comes back from an engine: pieces of text as they are made (`Delta`) and whole answers (`RequestOutput`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from neoserve.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position: its log-probability, its rank (1 is the likeliest) and its text.

    `decoded_token` is `None` when the model has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


# The chosen token comes first, then the top ones in order. Position 0 of a prompt has none.
PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one choice of a request.

    text: decoded and free of stop strings; may lag behind `token_ids` while a character or a stop string is open.
    token_ids: new tokens, the one that stopped the sequence included. logprobs: one entry for each of them.
    prompt_logprobs: of prompt tokens, from the second one on, in pieces as the prompt is processed.
    stop_reason: the stop string or the `stop_token_ids` id that ended the choice; `None` for an end-of-text token.
    num_host_tokens: how many of `token_ids` the host tier decoded.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_host_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request, as far as it is generated. The fields are those of `Delta`, added up."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_host_tokens: int = 0
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its choices. Names and shapes are vLLM's.

    prompt: `None` when the prompt was given as token ids. prompt_logprobs: one entry for each prompt token, the
    first `None`; `None` altogether unless `SamplingParams.prompt_logprobs` asked for them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    def add(self, delta: Delta) -> None:
        """Append what is new in one choice."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        if output.logprobs is not None:
            output.logprobs.extend(delta.logprobs)
        if self.prompt_logprobs is not None and delta.index == 0:
            self.prompt_logprobs.extend(delta.prompt_logprobs)
        output.finish_reason = delta.finish_reason
        output.stop_reason = delta.stop_reason
        output.num_host_tokens += delta.num_host_tokens
        output.error = delta.error
