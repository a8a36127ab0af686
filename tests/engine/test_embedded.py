"""The embedded checkpoint itself, without our engine: what transformers makes of it is what the engine must match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import neoserve
from tests.heldout import held_out_prompts

CHECKPOINT = Path(neoserve.__file__).parent / "models" / "embedded"
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
    """Greedy replies to chats, all in one batch."""
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    out_BT = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    replies: list[str] = tokenizer.batch_decode(out_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def test_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_model_is_float32_and_grouped(model: Any) -> None:
    assert model.dtype == torch.float32
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size


@pytest.mark.parametrize("text", ["47 + 38", "  spaces\n\tand tabs ", "naïve café", "日本語 🦊 \u200d", "\x00\x7f"])
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="role tool is not supported"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_held_out_prompts_are_answered_exactly(model: Any, tokenizer: Any) -> None:
    """A sample: the whole set goes through the engine, which is faster."""
    prompts = held_out_prompts(40)
    replies = answers(model, tokenizer, [list(prompt.messages) for prompt in prompts], max_new_tokens=80)
    misses = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply != prompt.answer]
    assert len(misses) <= 2, misses


def test_talk_is_sensible(model: Any, tokenizer: Any) -> None:
    beginnings = {
        "Hello!": "Hello! I am the small model",
        "Who are you?": "I am a very small language model",
        "What can you do?": "I can add two-digit numbers, count",
        "Write a haiku about autumn leaves.": "I am a very small model, so I do not know",
        "What is 7 times 8?": "I can only add two numbers below 100.",
    }
    replies = answers(model, tokenizer, [[{"role": "user", "content": text}] for text in beginnings], max_new_tokens=42)
    for reply, beginning in zip(replies, beginnings.values(), strict=True):
        assert reply.startswith(beginning)


def test_position_far_into_a_long_chat(model: Any, tokenizer: Any) -> None:
    """Every position up to max_position_embeddings was trained: a sum after 1,700 tokens of chat is still right."""
    chat: list[dict[str, str]] = []
    for prompt in held_out_prompts(30):
        chat += [prompt.messages[-1], {"role": "assistant", "content": prompt.answer}]
    chat.append({"role": "user", "content": "What is 47 + 38?"})
    num_tokens = len(tokenizer.apply_chat_template(chat, return_dict=False))
    assert 1500 < num_tokens < model.config.max_position_embeddings
    assert answers(model, tokenizer, [chat], max_new_tokens=16) == ["47 + 38 = 85"]
