"""Tiny checkpoints of every family, saved by transformers: what tests load, and the model that they compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention is far from uniform and greedy choices are clear
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Name: model_type and what differs from _COMMON. rope_scaling and rope_theta are written as transformers 4 spelled
# them; transformers 5 converts them and saves rope_parameters.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-gqa3": ("llama", {"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 2}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0, "head_dim": 64}),
    "linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic-rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None, "rope_theta": 1000000.0}),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 7, "head_dim": 16, "hidden_size": 112,
                             "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_theta": 1000000.0}),
    "qwen3-tied": ("qwen3", {"head_dim": 64, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}  # fmt: skip


def family_config(name: str, **changes: Any) -> PretrainedConfig:
    """The tiny config of `FAMILIES[name]`, with changes."""
    model_type, differences = FAMILIES[name]
    return AutoConfig.for_model(model_type, **{**_COMMON, **differences, **changes})


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model of transformers with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def save_family(name: str, directory: Path, *, max_shard_size: str = "5GB", **changes: Any) -> PreTrainedModel:
    """Save `FAMILIES[name]` with random weights to `directory`, as transformers does, and return the model."""
    model = random_model(family_config(name, **changes))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of transformers, float32 [tokens, vocabulary], on the CPU."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)], device=model.device)).logits[0]
    return logits.float().cpu()


def rounded_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """`reference_logits` of the model in bfloat16 on the GPU: how exact bfloat16 lets anyone be."""
    return reference_logits(copy.deepcopy(model).to("cuda", torch.bfloat16), token_ids)
