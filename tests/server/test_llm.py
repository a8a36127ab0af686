"""`LLM` and `AsyncLLM`, as programs use them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from neoserve import LLM, AsyncLLM, InvalidRequestError, RequestTooLongError, SamplingParams

OPTIONS = {
    "device": "reference",
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "device_kv_tokens": 128,
    "host_memory_bytes": 8 * 2**20,
    "max_waiting": 4,
}
GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as loaded:
        yield loaded


def spell(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Spell {word}."}]


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    words = ["cat", "window", "dog", "banana", "sun", "house", "pig", "garden", "tea", "orange"] * 2
    outputs = llm.chat([spell(word) for word in words], GREEDY)  # many more than may wait in the engine
    assert [output.outputs[0].text for output in outputs] == ["-".join(word) for word in words]
    assert all(output.finished for output in outputs)


def test_shapes_are_those_of_vllm(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, n=2, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [output] = llm.generate("1, 2, 3, ", params)
    assert output.prompt == "1, 2, 3, "
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for index, choice in enumerate(output.outputs):
        assert choice.index == index
        assert len(choice.token_ids) == len(choice.logprobs) == 5
        assert choice.finish_reason == "length"
        for token_id, position in zip(choice.token_ids, choice.logprobs, strict=True):
            assert position[token_id].rank == 1
            assert len(position) == 2
    assert output.outputs[0].text == output.outputs[1].text


def test_one_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (2, 7)]
    outputs = llm.generate([[5, 6, 7], "1, 2, "], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 7]
    with pytest.raises(ValueError, match="2 sampling_params came for 1 prompts"):
        llm.generate("x", params)


def test_a_stop_string_is_not_shown_and_ends_the_request(llm: LLM) -> None:
    [output] = llm.chat(spell("banana"), SamplingParams(temperature=0, max_tokens=32, stop="n-a-n"))
    assert output.outputs[0].text == "b-a-"
    assert output.outputs[0].stop_reason == "n-a-n"
    [output] = llm.chat(
        spell("banana"), SamplingParams(temperature=0, stop=["n-a"], include_stop_str_in_output=True, max_tokens=32)
    )
    assert output.outputs[0].text == "b-a-n-a"


def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    [whole] = llm.generate("1, 2, 3, ", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    third = whole.outputs[0].token_ids[2]
    [stopped] = llm.generate("1, 2, 3, ", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[third]))
    choice = stopped.outputs[0]
    assert choice.stop_reason == third
    assert choice.token_ids[-1] == third
    assert whole.outputs[0].text.startswith(choice.text)
    [longer] = llm.generate(
        "1, 2, 3, ", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[third], min_tokens=6)
    )
    assert len(longer.outputs[0].token_ids) >= 6


def test_leaving_a_stream_early_ends_it(llm: LLM) -> None:
    deltas = llm.stream("1, 2, ", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    next(deltas)
    deltas.close()
    assert llm.stats().num_running == llm.stats().device_blocks_used == llm.stats().host_blocks_used == 0
    text = "".join(delta.text for delta in llm.stream_chat(spell("cat"), GREEDY))
    assert text == "c-a-t"


def test_wrong_prompts_are_refused_before_anything_runs(llm: LLM) -> None:
    before = llm.stats().iterations_total
    with pytest.raises(RequestTooLongError, match="context is 256"):
        llm.generate(["fine", "7" * 300], GREEDY)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        llm.generate([[]], GREEDY)
    assert llm.stats().iterations_total == before


async def test_the_async_engine_serves_many_at_once() -> None:
    async with await AsyncLLM.start(**OPTIONS) as llm:

        async def last(prompt: str) -> str:
            texts = [output.outputs[0].text async for output in llm.generate(prompt, GREEDY)]
            return texts[-1]

        texts = await asyncio.gather(*(last(f"{number}, ") for number in (1, 1, 2)))
        assert texts[0] == texts[1]
        async for _ in llm.generate("1, ", SamplingParams(max_tokens=200, ignore_eos=True)):
            break
        with pytest.raises(InvalidRequestError):
            await anext(llm.generate([10**9], GREEDY))
