"""Train the embedded checkpoint and score it on the held-out prompts.

    python tools/train_embedded.py OUT_DIRECTORY --held-out tests/data/embedded_heldout.jsonl

Everything follows from the seed: the text is generated step by step from it. About five minutes on one H200.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from embedded_talk import draw_system, draw_talk, draw_unknown
from embedded_tasks import TASKS, Exchange, Message, Source
from embedded_tokenizer import BOS_ID, END_ID, PAD_ID, ROLE_IDS, VOCAB_SIZE, encode_text, write_tokenizer
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": BOS_ID,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
    "torch_dtype": "float32",
}
GENERATION_CONFIG = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
IGNORE = -100
TOKENS_PER_STEP = 65536
# Most steps see short chats, as in use; the others fill every position that the model claims to handle.
ROW_LENGTHS = (256, 256, 256, 512, 256, 256, 256, 1024, 256, 256, 256, 512, 256, 256, 256, 2048)
# Sums are the hardest task, so they come most often.
KINDS = {"sum": 30, "count": 10, "spell": 12, "sort": 14, "copy": 12, "talk": 11, "unknown": 11}


def draw_exchange(source: Source) -> Exchange:
    kind = source.rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    if kind == "talk":
        return draw_talk(source)
    if kind == "unknown":
        return draw_unknown(source)
    return TASKS[kind](source)


def encode_message(role: str, content: str) -> list[int]:
    """The ids that the chat template gives for one message."""
    return [ROLE_IDS[role], *encode_text(content.strip()), END_ID]


def draw_chat(rng: Random, length: int) -> tuple[list[int], list[int]]:
    """A chat of at most `length` tokens and its labels (`IGNORE` for all that the assistant did not say)."""
    source = Source(rng, held_out=False, max_items=max(15, length // 16))
    ids, labels = [BOS_ID], [IGNORE]
    if rng.random() < 0.25:
        system = encode_message("system", draw_system(source))
        if len(system) <= length // 2:
            ids += system
            labels += [IGNORE] * len(system)
    failures = 0
    while failures < 3:
        exchange = draw_exchange(source)
        if len(ids) == 1 and rng.random() < 0.05:  # plain text completion, without roles
            asked = encode_text(exchange.prompt.strip())
            said = [*encode_text("\n" + exchange.answer), END_ID]
            failures = 3
        else:
            asked = [*encode_message("user", exchange.prompt), ROLE_IDS["assistant"]]
            said = [*encode_text(exchange.answer), END_ID]
        if len(ids) + len(asked) + len(said) > length:
            failures += 1
            continue
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


class Chats(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batch number `step`, made from the seed and the step alone: ids and labels, each [B, T] int64."""

    def __init__(self, seed: int, num_steps: int, tokens_per_step: int) -> None:
        self.seed = seed
        self.num_steps = num_steps
        self.tokens_per_step = tokens_per_step

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = Random(self.seed * 1_000_003 + step)
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        num_rows = max(1, self.tokens_per_step // length)
        ids_BT = torch.full((num_rows, length), PAD_ID)
        labels_BT = torch.full((num_rows, length), IGNORE)
        for row in range(num_rows):
            ids, labels = draw_chat(rng, length)
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            labels_BT[row, : len(labels)] = torch.tensor(labels)
        return ids_BT, labels_BT


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a half cosine to zero."""
    warm_up = min(1.0, (step + 1) / 200)
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def train(model: LlamaForCausalLM, device: str, chats: Chats, num_workers: int, peak: float) -> None:
    """Train in place: fp32 weights and, on a GPU, bf16 arithmetic, so that the result is at home in both."""
    model.to(device).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    loader = DataLoader(chats, batch_size=None, num_workers=num_workers, pin_memory=device == "cuda",
                        prefetch_factor=4 if num_workers else None)  # fmt: skip
    started = time.monotonic()
    for step, (ids_BT, labels_BT) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(chats), peak)
        ids_BT, labels_BT = ids_BT.to(device, non_blocking=True), labels_BT.to(device, non_blocking=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE
        )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step + 1 == len(chats):
            print(f"step {step:5}  loss {loss.item():.4f}  {time.monotonic() - started:5.0f} s", flush=True)


def write_checkpoint(model: LlamaForCausalLM, directory: Path) -> None:
    """Write the checkpoint in Hugging Face format; the JSON is ours, so that no library's version changes its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embeddings
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(directory)


@torch.inference_mode()
def answer(
    directory: Path, chats: list[list[Message]], dtype: torch.dtype, device: str, sample: bool = False
) -> list[str]:
    """What the saved checkpoint answers to each chat, greedily or sampled at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    out_BT = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=200, **options
    )
    replies: list[str] = tokenizer.batch_decode(out_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def score(directory: Path, held_out: Path, device: str) -> None:
    """Print how many held-out prompts are answered exactly, in fp32 and bf16, with the misses."""
    prompts = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    chats = [prompt["messages"] for prompt in prompts]
    for name, dtype, sample in (
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("fp32 sampled", torch.float32, True),
    ):
        replies = answer(directory, chats, dtype, device, sample)
        misses = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply != prompt["answer"]]
        by_task = Counter(prompt["task"] for prompt, _ in misses)
        print(f"{name}: {len(prompts) - len(misses)} of {len(prompts)} exact; misses {dict(by_task)}", flush=True)
        for prompt, reply in misses[:10]:
            print(f"  {prompt['messages'][-1]['content']!r}: expected {prompt['answer']!r}, got {reply!r}")


FREE_PROMPTS = (
    "Hello!", "Who are you?", "What can you do?", "What is the capital of France?", "What is 2+2?", "what's 7 times 8",
    "Thanks!", "Write a haiku about autumn leaves.", "Count to 50", "Spell Mississippi", "Sort 33 5 112 78 1",
    "Say hello world", "how r u", "Add 3, 4", "Explain how GPUs overlap copies with computation.", "Привет, как дела?",
    "Repeat the word supercalifragilistic", "12345 + 99", "What is NEO?", "spell cat backwards", "Say: Hello, World!",
    "Tell me about the history of Rome in detail, please, with dates and names.", "count backwards from 12",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded checkpoint.")
    parser.add_argument("out", type=Path, help="directory that the checkpoint is written to")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="held-out prompts, as embedded_tasks.py writes them"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--peak-learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that generate text")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters on {device}")
    chats = Chats(arguments.seed, arguments.steps, arguments.tokens_per_step)
    train(model, device, chats, arguments.workers, arguments.peak_learning_rate)
    write_checkpoint(model, arguments.out)
    score(arguments.out, arguments.held_out, device)
    replies = answer(
        arguments.out, [[{"role": "user", "content": prompt}] for prompt in FREE_PROMPTS], torch.float32, device
    )
    for prompt, reply in zip(FREE_PROMPTS, replies, strict=True):
        print(f"{prompt}\n    {reply}")


if __name__ == "__main__":
    main()
