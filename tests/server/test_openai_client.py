"""The official `openai` client against a real server."""

from __future__ import annotations

import math

import openai
import pytest

from tests.server.running import RunningServer

QUESTION = {"role": "user", "content": "Count from 3 to 12."}
ANSWER = "3, 4, 5, 6, 7, 8, 9, 10, 11, 12"


@pytest.fixture
def client(idle_server: RunningServer) -> openai.OpenAI:
    return idle_server.openai()


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="embedded", messages=[QUESTION], temperature=0, max_tokens=64)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="embedded",
            messages=[QUESTION],
            temperature=0,
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *content, usage = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in content) == ANSWER
    assert content[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in content][-1] == "stop"
    assert all(chunk.usage is None for chunk in content)
    assert usage.choices == []
    assert usage.usage.completion_tokens > 10
    assert len(content) > 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_messages_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": QUESTION["content"]}]
    answer = client.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": parts}], temperature=0, max_completion_tokens=64
    )
    assert answer.choices[0].message.content == ANSWER


def test_without_a_limit_the_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="embedded", messages=[QUESTION], temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 512


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="embedded", messages=[QUESTION], temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy takes the likeliest
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_of_an_echoed_prompt(client: openai.OpenAI, stream: bool) -> None:
    made = client.completions.create(
        model="embedded", prompt="2, 3, 4, ", temperature=0, max_tokens=4, logprobs=2, echo=True, stream=stream
    )
    choices = [chunk.choices[0] for chunk in made] if stream else [made.choices[0]]
    text = "".join(choice.text for choice in choices)
    logprobs = [choice.logprobs for choice in choices]
    tokens = [token for part in logprobs for token in part.tokens]
    values = [value for part in logprobs for value in part.token_logprobs]
    offsets = [offset for part in logprobs for offset in part.text_offset]
    assert text.startswith("2, 3, 4, ")
    assert "".join(tokens) == "<|bos|>" + text
    assert values[0] is None
    assert all(value <= 0 for value in values[1:])
    assert offsets == [0] + [len("".join(tokens[1:index])) for index in range(1, len(tokens))]


def test_echo_alone_generates_nothing(client: openai.OpenAI) -> None:
    made = client.completions.create(model="embedded", prompt="2, 3, 4", max_tokens=0, logprobs=0, echo=True)
    assert made.choices[0].text == "2, 3, 4"
    assert made.usage.completion_tokens == 0
    assert len(made.choices[0].logprobs.tokens) == made.usage.prompt_tokens


def test_many_prompts_and_choices_are_numbered(client: openai.OpenAI) -> None:
    prompts = ["1, 2, 3, ", "7, 8, 9, "]
    made = client.completions.create(model="embedded", prompt=prompts, n=2, temperature=0, max_tokens=6)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == made.choices[1].text
    assert made.choices[2].text == made.choices[3].text
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model="embedded", prompt=prompts, n=2, temperature=0, max_tokens=6, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in made.choices]


def test_a_prompt_of_token_ids_is_the_same_prompt(client: openai.OpenAI, server: RunningServer) -> None:
    token_ids = client.post("../tokenize", cast_to=object, body={"prompt": "4, 5, 6, "})["tokens"]
    by_text = client.completions.create(model="embedded", prompt="4, 5, 6, ", temperature=0, max_tokens=8)
    by_ids = client.completions.create(model="embedded", prompt=token_ids, temperature=0, max_tokens=8)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert client.post("../detokenize", cast_to=object, body={"tokens": token_ids})["prompt"].endswith("4, 5, 6, ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI, stream: bool) -> None:
    made = client.chat.completions.create(
        model="embedded", messages=[QUESTION], temperature=0, max_tokens=64, stop=[", 7", "nowhere"], stream=stream
    )
    if stream:
        chunks = list(made)
        text = "".join(chunk.choices[0].delta.content for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (text, reason) == ("3, 4, 5, 6", "stop")


def test_a_seed_makes_an_answer_repeatable(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        made = client.completions.create(model="embedded", prompt="Once", temperature=2, max_tokens=24, seed=seed)
        return made.choices[0].text

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(8)}) > 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[QUESTION])
