"""Text that grows token by token: characters stay whole, stop strings are found wherever tokens cut them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoserve.core.errors import CheckpointError, InvalidRequestError
from neoserve.engine.text import REPLACEMENT, Detokenizer, StopStrings, TextCodec


def pieces_of(codec: TextCodec, text: str, prompt: str = "") -> list[str]:
    detokenizer = Detokenizer(codec, codec.encode(prompt), skip_special_tokens=True)
    return [detokenizer.add([token_id]) for token_id in codec.encode(text)] + [detokenizer.finish()]


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_pieces_add_up_to_the_text_and_never_cut_a_character(codec: TextCodec, text: str, prompt: str) -> None:
    pieces = pieces_of(codec, text, prompt)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_an_unfinished_character_is_shown_only_at_the_end(codec: TextCodec) -> None:
    detokenizer = Detokenizer(codec, codec.encode("a"), skip_special_tokens=True)
    assert detokenizer.add(codec.encode("é")[:1]) == ""
    assert detokenizer.finish() == REPLACEMENT


def test_garbage_bytes_are_not_held_for_ever(codec: TextCodec) -> None:
    detokenizer = Detokenizer(codec, codec.encode("a"), skip_special_tokens=True)
    broken = codec.encode("é")[:1]
    assert REPLACEMENT in "".join(detokenizer.add(broken) for _ in range(100))


def test_special_tokens_are_shown_only_when_asked_for(codec: TextCodec) -> None:
    end = codec.encode("<|end|>")
    hidden = Detokenizer(codec, codec.encode("x"), skip_special_tokens=True)
    shown = Detokenizer(codec, codec.encode("x"), skip_special_tokens=False)
    assert "".join(hidden.add(end) for _ in range(50)) + hidden.add(codec.encode("y")) == "y"
    assert shown.add(end) == "<|end|>"


@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
def test_a_stop_string_is_found_however_the_text_is_cut(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    finder = StopStrings(stop, include=include)
    shown, found = "", None
    for begin, end in itertools.pairwise(borders):
        piece, found = finder.add(text[begin:end])
        shown += piece
        if found is not None:
            break
    else:
        shown += finder.finish()
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))]
    if not ends:
        assert (shown, found) == (text, None)
        return
    longest = max((one for one in stop if text[: ends[0]].endswith(one)), key=len)
    assert (shown, found) == (text[: ends[0] if include else ends[0] - len(longest)], longest)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["END"], include=False)
    assert finder.add("a E") == ("a ", None)
    assert finder.add("N") == ("", None)
    assert finder.add("x") == ("ENx", None)
    assert finder.add("bEND and more") == ("b", "END")


def test_the_chat_template_renders_and_its_refusal_is_the_requests_mistake(codec: TextCodec) -> None:
    assert codec.render_chat([{"role": "user", "content": "hi"}]) == "<|user|>hi<|end|><|assistant|>"
    with pytest.raises(InvalidRequestError, match="no tools here") as caught:
        codec.render_chat([{"role": "tool", "content": "hi"}])
    assert caught.value.param == "messages"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: object) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        TextCodec(str(tmp_path))
