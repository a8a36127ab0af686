"""The answers of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from neoserve.engine.intake import Submission
from neoserve.engine.outputs import CompletionOutput, Delta, PositionLogprobs, RequestOutput
from neoserve.engine.text import TextCodec
from neoserve.server import logprobs
from neoserve.server.generation import AnswerFormat
from neoserve.server.protocol import CompletionBody
from neoserve.server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
)


@dataclass(slots=True)
class _StreamedChoice:
    """What a streamed choice has shown: whether anything, and how many characters of tokens with log-probabilities."""

    started: bool = False
    offset: int = 0
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=lambda: [None])


class CompletionAnswer(AnswerFormat):
    """Shapes the answer to one `CompletionBody`; choices are numbered over all its prompts."""

    def __init__(
        self, body: CompletionBody, submissions: Sequence[Submission], codec: TextCodec | None, model: str
    ) -> None:
        super().__init__("cmpl", model)
        self._body = body
        self._submissions = submissions
        self._codec = codec
        self._streamed: dict[int, _StreamedChoice] = {}

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Completion:
        choices = [
            self._whole_choice(position, output, choice)
            for position, output in enumerate(outputs)
            for choice in output.outputs
        ]
        return Completion(self.id, self.created, self.model, choices, usage)

    def chunk(self, position: int, delta: Delta) -> Completion | None:
        index = self._index(position, delta.index)
        streamed = self._streamed.setdefault(index, _StreamedChoice())
        if not streamed.started:
            streamed.prompt_logprobs.extend(delta.prompt_logprobs)
            if not delta.token_ids and delta.finish_reason is None:
                return None
        choice = self._choice(index, position, delta, first=None if streamed.started else streamed.prompt_logprobs)
        choice.logprobs = self._logprobs(position, delta.logprobs, streamed)
        streamed.started = True
        if not (choice.text or choice.finish_reason or choice.logprobs or choice.token_ids):
            return None
        return Completion(self.id, self.created, self.model, [choice])

    def usage_chunk(self, usage: Usage) -> Completion:
        return Completion(self.id, self.created, self.model, [], usage)

    def num_generated(self, delta: Delta) -> int:
        return 0 if self._body.only_echo else len(delta.token_ids)

    def _whole_choice(self, position: int, output: RequestOutput, choice: CompletionOutput) -> CompletionChoice:
        index = self._index(position, choice.index)
        whole = self._choice(index, position, choice, first=output.prompt_logprobs or [None])
        streamed = _StreamedChoice(prompt_logprobs=output.prompt_logprobs or [None])
        whole.logprobs = self._logprobs(position, choice.logprobs or (), streamed)
        return whole

    def _index(self, position: int, choice_index: int) -> int:
        return position * len(self._submissions[position].requests) + choice_index

    def _choice(
        self,
        index: int,
        position: int,
        new: Delta | CompletionOutput,
        first: list[PositionLogprobs | None] | None,
    ) -> CompletionChoice:
        """A choice without its log-probabilities. first: the prompt's, when the choice begins here."""
        wants_ids = bool(self._body.return_token_ids)
        begins = first is not None
        text = "" if self._body.only_echo else new.text
        return CompletionChoice(
            index=index,
            text=self._prompt_text(position) + text if begins and self._body.echo else text,
            finish_reason=new.finish_reason,
            stop_reason=new.stop_reason,
            prompt_logprobs=self._prompt_logprobs(first),
            token_ids=list(new.token_ids) if wants_ids else UNSET,
            prompt_token_ids=list(self._submissions[position].prompt_token_ids) if wants_ids and begins else UNSET,
        )

    def _prompt_text(self, position: int) -> str:
        submission = self._submissions[position]
        if submission.prompt is not None:
            return submission.prompt
        return "" if self._codec is None else self._codec.decode(submission.prompt_token_ids)

    def _prompt_logprobs(self, first: list[PositionLogprobs | None] | None) -> PromptLogprobs | UnsetType:
        if first is None or self._body.prompt_logprobs is None:
            return UNSET
        return logprobs.for_prompt(first)

    def _logprobs(
        self, position: int, new: Sequence[PositionLogprobs], streamed: _StreamedChoice
    ) -> CompletionLogprobs | None:
        """OpenAI's log-probabilities of what is new, an echoed prompt's first."""
        if self._body.logprobs is None:
            return None
        positions = [] if self._body.only_echo else list(new)
        if streamed.started or not self._body.echo:
            shaped = logprobs.for_completion(positions, streamed.offset)
            streamed.offset += sum(map(len, shaped.tokens))
            return shaped
        first_token = self._first_token(position)
        # A token that the tokenizer puts before the text is no part of it.
        width = len(first_token) if self._prompt_text(position).startswith(first_token) else 0
        prompt = [entry for entry in streamed.prompt_logprobs if entry is not None]
        rest = logprobs.for_completion(prompt + positions, width)
        streamed.offset = width + sum(map(len, rest.tokens))
        return logprobs.prepend_prompt(first_token, rest)

    def _first_token(self, position: int) -> str:
        token_id = self._submissions[position].prompt_token_ids[0]
        return f"token_id:{token_id}" if self._codec is None else self._codec.token_text(token_id)
