"""Requests of the HTTP API, checked. Fields are OpenAI's, plus vLLM's extensions.

Unknown fields are ignored (`server/api.py` warns of them); a field that is known but not supported is refused,
because ignoring it would change the answer. `null` means that the field was not given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from neoserve.core.errors import InvalidRequestError
from neoserve.core.request import MAX_LOGPROBS, MAX_STOP, SamplingParams

MAX_CHOICES = 1024  # prompts times n of one request

# Fields that other servers read and that cannot change an answer here.
_HARMLESS = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
     "request_id", "priority", "spaces_between_special_tokens", "detokenize"}
)  # fmt: skip

# Fields that are refused, and the values with which they mean nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
    "prompt_embeds": (None,),
}


class Body(BaseModel):
    """A request body: strict types, unknown fields kept aside."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None

    @model_validator(mode="after")
    def check_extra_fields(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
                raise InvalidRequestError(f"{name} is not supported", name)
        return self

    @property
    def unknown_fields(self) -> list[str]:
        """Fields that nothing reads and whose absence from the answer may surprise."""
        known = _HARMLESS | _UNSUPPORTED.keys()
        return [name for name in self.model_extra or {} if name not in known]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class SamplingBody(Body):
    """What completions and chat completions have in common."""

    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # vLLM's extensions
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: list[int] | None = None
    top_k: int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    _SAMPLING: ClassVar[tuple[str, ...]] = (
        "frequency_penalty", "n", "presence_penalty", "seed", "stop", "temperature", "top_p", "ignore_eos",
        "include_stop_str_in_output", "min_p", "min_tokens", "prompt_logprobs", "repetition_penalty",
        "skip_special_tokens", "stop_token_ids", "top_k",
    )  # fmt: skip

    @field_validator("stop", mode="before")
    @classmethod
    def check_stop(cls, stop: object) -> object:
        is_list = isinstance(stop, list) and all(isinstance(text, str) for text in stop)
        if not (stop is None or isinstance(stop, str) or is_list):
            raise InvalidRequestError(f"stop is {_short(stop)}; expected a string or up to {MAX_STOP} strings", "stop")
        return stop

    @model_validator(mode="after")
    def check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed when stream is true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def given_params(self) -> dict[str, Any]:
        """The sampling parameters that the request names."""
        given = {name: value for name in self._SAMPLING if (value := getattr(self, name)) is not None}
        if given.get("stop") in ("", []):
            del given["stop"]
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return given


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def check_prompt(cls, prompt: object) -> object:
        if not (isinstance(prompt, str) or _is_tokens(prompt) or _is_list_of_prompts(prompt)):
            raise InvalidRequestError(
                f"prompt is {_short(prompt)}; expected a string, token ids, or a list of either", "prompt"
            )
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def only_echo(self) -> bool:
        """Whether the prompt and nothing else is wanted back."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, build: Callable[..., SamplingParams]) -> SamplingParams:
        """Sampling parameters; `build` fills in the defaults of the model."""
        given = self.given_params()
        if self.max_tokens is not None:
            given["max_tokens"] = 1 if self.only_echo else self.max_tokens
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                given.setdefault("prompt_logprobs", self.logprobs)
        num_choices = len(self.prompts) * given.get("n", 1)
        if num_choices > MAX_CHOICES:
            raise InvalidRequestError(f"{num_choices} choices were asked for; expected at most {MAX_CHOICES}", "prompt")
        return build(**given)


class ChatMessageBody(BaseModel):
    """One message; what else it holds (name, tool calls) is left to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def check_content(cls, content: object) -> object:
        if not (content is None or isinstance(content, str) or _is_text_parts(content)):
            raise InvalidRequestError(
                f"a message's content is {_short(content)}; expected a string or parts of type text", "messages"
            )
        return content

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content or ""}


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessageBody] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_fields(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(
                f"top_logprobs is {self.top_logprobs}; expected 0 to {MAX_LOGPROBS}", "top_logprobs"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs is not available when stream is true", "prompt_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        return self

    def template_options(self) -> dict[str, Any]:
        """Arguments of `TextCodec.render_chat` besides the messages."""
        continues = bool(self.continue_final_message)
        return {
            "add_generation_prompt": not continues and self.add_generation_prompt is not False,
            "continue_final_message": continues,
            "template_kwargs": self.chat_template_kwargs,
        }

    def params(self, build: Callable[..., SamplingParams]) -> SamplingParams:
        """Sampling parameters; `build` fills in the defaults of the model. Without a limit the context is the limit."""
        given = self.given_params()
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given["max_tokens"] = limit
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return build(**given)


class TokenizeBody(Body):
    """`POST /tokenize`: the ids of a prompt or of a conversation."""

    prompt: str | None = None
    messages: list[ChatMessageBody] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_one_of(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("expected either prompt or messages", "prompt")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`: the text of ids."""

    tokens: list[int]


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _is_list_of_prompts(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, str) for item in value) or all(map(_is_tokens, value))


def _is_text_parts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    )


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidRequestError(f"logit_bias has the key {key!r}; expected token ids", "logit_bias") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
