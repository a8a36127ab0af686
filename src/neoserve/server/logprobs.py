"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from neoserve.engine.outputs import Logprob, PositionLogprobs
from neoserve.engine.text import REPLACEMENT
from neoserve.server.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)


def for_completion(positions: Sequence[PositionLogprobs], first_offset: int) -> CompletionLogprobs:
    """The positions of a text that begins `first_offset` characters into the choice."""
    logprobs = CompletionLogprobs([], [], [], [])
    offset = first_offset
    for position in positions:
        token_id, chosen = next(iter(position.items()))
        token = _token(token_id, chosen)
        logprobs.text_offset.append(offset)
        logprobs.tokens.append(token)
        logprobs.token_logprobs.append(chosen.logprob)
        logprobs.top_logprobs.append({_token(other_id, other): other.logprob for other_id, other in position.items()})
        offset += len(token)
    return logprobs


def prepend_prompt(first_token: str, prompt: CompletionLogprobs) -> CompletionLogprobs:
    """An echoed prompt: nothing is known of its first token's probability."""
    return CompletionLogprobs(
        text_offset=[0, *prompt.text_offset],
        token_logprobs=[None, *prompt.token_logprobs],
        tokens=[first_token, *prompt.tokens],
        top_logprobs=[None, *prompt.top_logprobs],
    )


def for_chat(positions: Sequence[PositionLogprobs], num_top: int) -> ChatLogprobs:
    """The positions of a message, each with its `num_top` likeliest tokens."""
    content = []
    for position in positions:
        token_id, chosen = next(iter(position.items()))
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        top = [
            TopLogprob(_token(other_id, other), other.logprob, _bytes(other))
            for other_id, other in ranked
            if other.rank <= num_top
        ]
        content.append(ChatTokenLogprob(_token(token_id, chosen), chosen.logprob, _bytes(chosen), top))
    return ChatLogprobs(content)


def for_prompt(positions: Sequence[PositionLogprobs | None]) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: token id to log-probability, `None` for the first token."""
    return [
        None
        if position is None
        else {key: PromptLogprob(item.logprob, item.rank, item.decoded_token) for key, item in position.items()}
        for position in positions
    ]


def _token(token_id: int, logprob: Logprob) -> str:
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token


def _bytes(logprob: Logprob) -> list[int] | None:
    token = logprob.decoded_token
    return None if token is None or REPLACEMENT in token else list(token.encode())
