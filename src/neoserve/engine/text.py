"""Text and token ids: the tokenizer, chat templates, and text that grows token by token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from neoserve.core.errors import CheckpointError, InvalidRequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, so more pending tokens than this are not the beginning of one.
_MAX_PENDING_TOKENS = 8
# Tokens of the prompt that give the first generated token its context, e.g. whether a space precedes it.
_CONTEXT_TOKENS = 5

ChatMessage = Mapping[str, Any]


def import_tokenizers() -> None:
    """Import what `TextCodec` needs, which takes seconds; for a thread to do while a model loads.

    Never raises: `TextCodec` imports it again and says what is wrong, and a start that failed for another reason says
    that one.
    """
    with suppress(Exception):
        import transformers

        assert transformers.AutoTokenizer


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        """Load from a directory or a hub name; raises `CheckpointError` when there is no tokenizer."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no tokenizer could be loaded from {path!r}: {error}") from error
        self._tokenizer: Any = tokenizer
        self.vocab_size = len(tokenizer)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around a prompt if wanted."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become replacement characters."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the chat template makes of `messages`; encode it without special tokens.

        Raises `InvalidRequestError` without a template or when the template refuses the messages.
        """
        from jinja2 import TemplateError

        # A template of the client's own would be a program of the client's own.
        reserved = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
        wrong = sorted(reserved & (template_kwargs or {}).keys())
        if wrong:
            raise InvalidRequestError(f"chat_template_kwargs may not have {wrong[0]!r}", "chat_template_kwargs")
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template; use completions with a prompt", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequestError(f"the chat template refused the messages: {error}", "messages") from error
        return text


class Detokenizer:
    """The text of a growing sequence, in pieces that never end inside a character.

    A token's text depends on its neighbours, so each piece is the difference between two decodings that begin at the
    same character a little earlier; ids whose decoding ends in an incomplete character wait for the next ones.
    """

    def __init__(self, codec: TextCodec, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skip_special_tokens = skip_special_tokens
        self._window = self._context(prompt_token_ids)  # ids that are decoded together
        self._num_done = len(self._window)  # how many of them are in pieces that were returned

    def add(self, token_ids: Sequence[int]) -> str:
        """The characters that `token_ids` complete."""
        pieces = []
        for token_id in token_ids:
            self._window.append(token_id)
            pieces.append(self._take(flush=False))
        return "".join(pieces)

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that never became one."""
        return self._take(flush=True)

    def _take(self, *, flush: bool) -> str:
        num_pending = len(self._window) - self._num_done
        if num_pending == 0:
            return ""
        before = self._decode(self._window[: self._num_done])
        after = self._decode(self._window)
        if after == before:  # special tokens that are skipped
            del self._window[self._num_done :]
            return ""
        is_open = after.endswith(REPLACEMENT) and num_pending <= _MAX_PENDING_TOKENS
        if is_open and not flush:
            return ""
        self._window = self._window[self._num_done :]
        self._num_done = num_pending
        return after[len(before) :]

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The end of the prompt, from the beginning of a character on."""
        for length in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + 4):
            context = list(prompt_token_ids[-length:])
            if not self._decode(context).startswith(REPLACEMENT):
                return context
        return list(prompt_token_ids[-_CONTEXT_TOKENS:])

    def _decode(self, token_ids: list[int]) -> str:
        return self._codec.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopStrings:
    """Looks for stop strings in text that arrives in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown, and the stop string that was found, if any; nothing follows it then.

        The one that ends first counts, the longest of those: whatever pieces the text comes in, it is the same one.
        """
        text = self._held + text
        hits = ((at + len(stop), -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0)
        found = min(hits, default=None)
        if found is not None:
            end, _, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
