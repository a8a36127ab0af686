"""From the engine's token events to deltas of text, delivered to whoever reads each request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from neoserve.core.plan import TokenLogprobs
from neoserve.core.request import FinishReason, Request, SamplingParams, TokenEvent
from neoserve.engine.intake import Submission
from neoserve.engine.outputs import Delta, Logprob, PositionLogprobs
from neoserve.engine.text import Detokenizer, StopStrings, TextCodec


class ChoiceText:
    """One choice's text as its tokens come: characters, stop strings, log-probabilities."""

    def __init__(self, index: int, request: Request, codec: TextCodec | None) -> None:
        params = request.params
        self._index = index
        self._params: SamplingParams = params
        self._codec = codec
        self._stop = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._detokenizer = (
            None
            if codec is None
            else Detokenizer(codec, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        )

    def add(self, event: TokenEvent) -> Delta:
        """The delta of `event`; it is finished when the event is or when a stop string was found."""
        text, stop = self._text(event)
        finish_reason: FinishReason | None = event.finish_reason
        stop_reason: int | str | None = None
        if stop is not None:
            finish_reason, stop_reason = "stop", stop
        elif event.stop_id is not None and event.stop_id in self._params.stop_token_ids:
            stop_reason = event.stop_id
        return Delta(
            index=self._index,
            text=text,
            token_ids=event.token_ids,
            logprobs=tuple(map(self._position, event.logprobs)),
            prompt_logprobs=tuple(map(self._position, event.prompt_logprobs)),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_host_tokens=event.num_host_tokens,
            error=event.error,
        )

    def _text(self, event: TokenEvent) -> tuple[str, str | None]:
        self._num_tokens += len(event.token_ids)
        if self._detokenizer is None:
            return "", None
        shown = event.token_ids
        if event.stop_id is not None and not self._params.include_stop_str_in_output:
            shown = shown[:-1]  # the token that stopped the sequence is no part of its text
        text = self._detokenizer.add(shown)
        if event.finish_reason is not None:
            text += self._detokenizer.finish()
        if self._num_tokens <= self._params.min_tokens and event.finish_reason is None:
            return text, None
        text, stop = self._stop.add(text)
        if stop is None and event.finish_reason is not None:
            text += self._stop.finish()
        return text, stop

    def _position(self, position: TokenLogprobs) -> PositionLogprobs:
        logprobs = {position.token_id: Logprob(position.logprob, position.rank, self._token_text(position.token_id))}
        for rank, (token_id, logprob) in enumerate(position.top, start=1):
            logprobs.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return logprobs

    def _token_text(self, token_id: int) -> str | None:
        return None if self._codec is None else self._codec.token_text(token_id)


@dataclass(frozen=True, slots=True)
class _Open:
    text: ChoiceText
    deliver: Callable[[Delta], None]


class Router:
    """The requests that are open, by id."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._open: dict[str, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, submission: Submission, deliver: Callable[[Delta], None]) -> None:
        """Deliver the deltas of `submission` from now on."""
        for index, request in enumerate(submission.requests):
            self._open[request.request_id] = _Open(ChoiceText(index, request, self._codec), deliver)

    def close(self, submission: Submission) -> list[str]:
        """Deliver nothing more of `submission`; returns the ids that were still running, for the engine to abort."""
        return [request.request_id for request in submission.requests if self._open.pop(request.request_id, None)]

    def route(self, events: Iterable[TokenEvent]) -> list[str]:
        """Deliver `events`; returns the ids that a stop string ended, for the engine to abort.

        Events of requests that are not open are those of aborts that crossed them on the way, and are dropped.
        """
        stopped = []
        for event in events:
            entry = self._open.get(event.request_id)
            if entry is None:
                continue
            delta = entry.text.add(event)
            if delta.finish_reason is not None:
                del self._open[event.request_id]
                if event.finish_reason is None:
                    stopped.append(event.request_id)
            entry.deliver(delta)
        return stopped
