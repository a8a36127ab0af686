"""The answers of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from neoserve.engine.intake import Submission
from neoserve.engine.outputs import CompletionOutput, Delta, PositionLogprobs, RequestOutput
from neoserve.server import logprobs
from neoserve.server.generation import AnswerFormat
from neoserve.server.protocol import ChatBody
from neoserve.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Usage,
)


class ChatAnswer(AnswerFormat):
    """Shapes the answer to one `ChatBody`."""

    def __init__(self, body: ChatBody, submission: Submission, model: str) -> None:
        super().__init__("chatcmpl", model)
        self._body = body
        self._submission = submission
        self._started: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> ChatCompletion:
        output = outputs[0]
        wants_prompt_logprobs = self._body.prompt_logprobs is not None
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._whole_choice(choice) for choice in output.outputs],
            usage=usage,
            prompt_logprobs=logprobs.for_prompt(output.prompt_logprobs or []) if wants_prompt_logprobs else UNSET,
            prompt_token_ids=list(self._submission.prompt_token_ids) if self._body.return_token_ids else UNSET,
        )

    def chunk(self, position: int, delta: Delta) -> ChatChunk | None:
        begins = delta.index not in self._started
        shows_tokens = begins or self._body.return_token_ids
        if not (delta.text or delta.finish_reason or delta.logprobs or (shows_tokens and delta.token_ids)):
            return None
        self._started.add(delta.index)
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatMessage("assistant" if begins else UNSET, delta.text),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self._token_ids(delta),
        )
        return ChatChunk(self.id, self.created, self.model, [choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.model, [], usage)

    def _whole_choice(self, choice: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=ChatMessage("assistant", choice.text),
            logprobs=self._logprobs(choice.logprobs or ()),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=self._token_ids(choice),
        )

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
        return logprobs.for_chat(positions, self._body.top_logprobs or 0) if self._body.logprobs else None

    def _token_ids(self, new: Delta | CompletionOutput) -> list[int] | UnsetType:
        return list(new.token_ids) if self._body.return_token_ids else UNSET
