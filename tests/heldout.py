"""The prompts that the embedded checkpoint was never trained on, with the one right answer to each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_FILE = Path(__file__).with_name("data") / "embedded_heldout.jsonl"


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A chat that ends with a question, and its answer. `task` is sum, count, spell, sort or copy."""

    task: str
    messages: tuple[dict[str, str], ...]
    answer: str


def held_out_prompts(limit: int | None = None) -> list[HeldOutPrompt]:
    """The first `limit` held-out prompts (all 500 when `None`); any multiple of 5 has as many of each task."""
    lines = HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()[:limit]
    records = [json.loads(line) for line in lines]
    return [HeldOutPrompt(record["task"], tuple(record["messages"]), record["answer"]) for record in records]
