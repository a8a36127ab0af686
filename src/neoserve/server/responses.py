"""What the HTTP API answers, in OpenAI's shapes with vLLM's extensions."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from neoserve.core.request import FinishReason


class Usage(msgspec.Struct):
    """Tokens of a request: those of its prompts, those generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities as `/v1/completions` has them; the first token of an echoed prompt has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct):
    """One token at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct):
    """A choice, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """Answer or chunk of `/v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(msgspec.Struct):
    """A token that might have been chosen. `bytes` is `None` for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct):
    """The token that was chosen."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities as `/v1/chat/completions` has them."""

    content: list[ChatTokenLogprob]


class ChatMessage(msgspec.Struct):
    """A message of the assistant, or what is new in it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """A whole choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What is new in a choice."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """Answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(msgspec.Struct):
    """Chunk of a streamed `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ErrorBody(msgspec.Struct):
    """The inside of an error answer."""

    message: str
    type: str
    param: str | None
    code: str | int


class ErrorResponse(msgspec.Struct):
    """OpenAI's form of an error."""

    error: ErrorBody


class ModelCard(msgspec.Struct):
    """An entry of `/v1/models`."""

    id: str
    created: int
    root: str
    max_model_len: int
    owned_by: str = "neo"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """`GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """Answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(msgspec.Struct):
    """Answer of `/detokenize`."""

    prompt: str


class Load(msgspec.Struct):
    """Answer of `/load`. server_load: choices that are being generated or wait to be."""

    server_load: int
    running: int
    waiting: int
    device_blocks_used: int
    device_blocks: int
    host_blocks_used: int
    host_blocks: int


class Version(msgspec.Struct):
    """Answer of `/version`."""

    version: str
