"""From what a user sends to what the engine core takes: the last place where a mistake can be a 400."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neoserve.core.errors import InvalidRequestError, RequestTooLongError
from neoserve.core.request import Request, SamplingParams
from neoserve.core.stats import EngineInfo
from neoserve.engine.outputs import CompletionOutput, RequestOutput
from neoserve.engine.text import ChatMessage, TextCodec

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Submission:
    """A user's request, checked and tokenised: one prompt and a `Request` for each of its n choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    requests: tuple[Request, ...]

    def empty_output(self) -> RequestOutput:
        """The output before anything has come back."""
        wants_logprobs = self.params.logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[
                CompletionOutput(index, logprobs=[] if wants_logprobs else None) for index in range(len(self.requests))
            ],
            prompt_logprobs=None if self.params.prompt_logprobs is None else [None],
        )


class Intake:
    """Checks and tokenises prompts for one engine."""

    def __init__(self, info: EngineInfo, codec: TextCodec | None) -> None:
        self._info = info
        self._codec = codec

    def default_params(self, **given: object) -> SamplingParams:
        """Sampling parameters as given, the checkpoint's generation_config for the rest, then our defaults."""
        defaults: dict[str, object] = dict(self._info.default_sampling)
        if "top_k" in defaults:
            defaults["top_k"] = int(self._info.default_sampling["top_k"])
        return SamplingParams(**{**defaults, **given})  # type: ignore[arg-type]

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> Submission:
        """Tokenise `prompt`, check it against the engine's limits and decide `max_tokens`.

        Raises `InvalidRequestError` for a prompt or parameters that this model cannot take, and
        `RequestTooLongError` when prompt and `max_tokens` do not fit in the context.
        """
        token_ids = self._token_ids(prompt, add_special_tokens)
        self.check_token_ids(params.logit_bias, "logit_bias")
        self.check_token_ids(params.stop_token_ids, "stop_token_ids")
        if params.stop and self._codec is None:
            raise InvalidRequestError("this model has no tokenizer, so it cannot look for stop strings", "stop")
        params = self._fit(len(token_ids), params)
        request_id = request_id or uuid.uuid4().hex
        stop_ids = (
            tuple(params.stop_token_ids) if params.ignore_eos else self._info.eos_ids + tuple(params.stop_token_ids)
        )
        arrival_s = time.monotonic()
        return Submission(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            requests=tuple(
                Request(f"{request_id}-{index}", token_ids, params.for_choice(index), stop_ids, arrival_s)
                for index in range(params.n)
            ),
        )

    def prepare_chat(
        self,
        messages: Sequence[ChatMessage],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = False,
        **template_options: Any,
    ) -> Submission:
        """Like `prepare`, for the prompt that the chat template makes; template_options: of `TextCodec.render_chat`."""
        if self._codec is None:
            raise InvalidRequestError("this model has no tokenizer and so no chat template", "messages")
        text = self._codec.render_chat(messages, **template_options)
        return self.prepare(text, params, request_id=request_id, add_special_tokens=add_special_tokens)

    def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._codec is None:
                raise InvalidRequestError("this model has no tokenizer; send the prompt as token ids", "prompt")
            token_ids = self._codec.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = tuple(prompt)
            self.check_token_ids(token_ids, "prompt")
        if not token_ids:
            raise InvalidRequestError("prompt is empty; expected at least one token", "prompt")
        return token_ids

    def _fit(self, num_prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        limit = self._info.config.max_model_len
        room = limit - num_prompt_tokens
        if room < 1:
            raise RequestTooLongError(
                f"the prompt has {num_prompt_tokens} tokens; this model's context is {limit}, so at most "
                f"{limit - 1} fit beside one generated token",
                "prompt",
            )
        if params.max_tokens is None:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        elif params.max_tokens > room:
            raise RequestTooLongError(
                f"max_tokens is {params.max_tokens}, but after the prompt's {num_prompt_tokens} tokens only {room} "
                f"of this model's context of {limit} are left; shorten the prompt or ask for less",
                "max_tokens",
            )
        return params

    def check_token_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raise `InvalidRequestError` for field `param` when an id is not in the vocabulary."""
        vocab_size = self._info.config.shape.vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(f"{param} has token id {wrong}; expected 0 to {vocab_size - 1}", param)
