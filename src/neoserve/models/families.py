"""Which architectures NEO runs, and how a config.json is read.

The families differ only in what the table says; one decoder runs them all. config.json is read as JSON, in the
spelling of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from neoserve.core.config import DType, ModelShape
from neoserve.core.errors import CheckpointError, UnsupportedModelError
from neoserve.models.spec import ModelSpec, RopeSpec, RopeType

Config = Mapping[str, Any]

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Family:
    """What sets an architecture apart.

    versions: which of its models, for messages. qkv_bias: always, or (`None`) as `attention_bias` says, which then
    puts one on the output projection too. head_dim: when the config gives none (`None`: hidden size / query heads).
    window: whether the model looks at `sliding_window` never, always, or when `use_sliding_window` is true.
    """

    name: str
    versions: str
    qk_norm: bool = False
    qkv_bias: bool | None = None
    mlp_bias_field: str | None = None
    head_dim: int | None = None
    window: Literal["never", "always", "switched"] = "never"


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", "Llama 2, 3, 3.1, 3.2", mlp_bias_field="mlp_bias"),
    "MistralForCausalLM": Family("mistral", "Mistral without a sliding window", qkv_bias=False, window="always"),
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2, Qwen2.5", qkv_bias=True, window="switched"),
    "Qwen3ForCausalLM": Family("qwen3", "Qwen3", qk_norm=True, head_dim=128, window="switched"),
}


def parse_config(config: Config, generation: Config, source: str) -> ModelSpec:
    """The model that `config` (config.json) and `generation` (generation_config.json) describe.

    `source` names the checkpoint in messages. Raises `UnsupportedModelError` for what NEO does not run, by name, and
    `CheckpointError` for a config without a field that it must have.
    """
    family = _family(config, source)
    _refuse_quantization(config, source)
    _refuse_sliding_window(config, family, source)
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(f"{source} has hidden_act {activation!r}; NEO supports 'silu'")
    shape = _shape(config, family, source)
    attention_bias = bool(config.get("attention_bias", False)) if family.qkv_bias is None else False
    return ModelSpec(
        family=family.name,
        shape=shape,
        rope=_rope(config, shape, source),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        dtype=_dtype(config, source),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias_field is not None and bool(config.get(family.mlp_bias_field, False)),
        qk_norm=family.qk_norm,
        eos_ids=_eos_ids(generation) or _eos_ids(config),
        default_sampling=tuple((n, generation[n]) for n in SAMPLING_DEFAULTS if generation.get(n) is not None),
    )


def _family(config: Config, source: str) -> Family:
    came = config.get("architectures") or [f"model_type {config.get('model_type')}"]
    for architecture, family in FAMILIES.items():
        if came[0] == architecture or came[0] == f"model_type {family.name}":
            return family
    supported = "; ".join(f"{name} ({family.versions})" for name, family in FAMILIES.items())
    raise UnsupportedModelError(f"{source} has the architecture {came[0]}; NEO supports {supported}")


def _refuse_quantization(config: Config, source: str) -> None:
    for name in ("quantization_config", "compression_config"):
        if quantization := config.get(name):
            method = quantization.get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"{source} is quantised ({name} with quant_method {method!r}); NEO supports unquantised checkpoints in "
                f"{', '.join(get_args(DType))}"
            )


def _refuse_sliding_window(config: Config, family: Family, source: str) -> None:
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if others:
        raise UnsupportedModelError(f"{source} has layers of type {', '.join(others)}; NEO supports full_attention")
    if family.window == "never" or (family.window == "switched" and not config.get("use_sliding_window", False)):
        return
    window = config.get("sliding_window", 4096)  # transformers' default for every family that has one
    if window is not None and window < _integer(config, "max_position_embeddings", source):
        raise UnsupportedModelError(
            f"{source} has an active sliding_window of {window} tokens; NEO supports full attention only"
        )


def _integer(config: Config, name: str, source: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json of {source} has {name} {value!r}; expected an integer of at least 1")
    return value


def _shape(config: Config, family: Family, source: str) -> ModelShape:
    hidden_size = _integer(config, "hidden_size", source)
    num_query_heads = _integer(config, "num_attention_heads", source)
    num_kv_heads = _integer(config, "num_key_value_heads", source, default=num_query_heads)
    head_dim = _integer(config, "head_dim", source, default=family.head_dim or hidden_size // num_query_heads)
    if num_query_heads % num_kv_heads:
        raise CheckpointError(f"{source}: {num_query_heads} query heads do not divide over {num_kv_heads} kv heads")
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim is {head_dim}; rotary embedding needs an even one")
    return ModelShape(
        num_layers=_integer(config, "num_hidden_layers", source),
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        ffn_size=_integer(config, "intermediate_size", source),
        vocab_size=_integer(config, "vocab_size", source),
        max_position=_integer(config, "max_position_embeddings", source),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rope(config: Config, shape: ModelShape, source: str) -> RopeSpec:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(
            f"{source} has rope parameters for each of {', '.join(nested)}; NEO supports one set"
        )
    if rope_type not in get_args(RopeType):
        supported = ", ".join(get_args(RopeType))
        raise UnsupportedModelError(f"{source} has the rope type {rope_type!r}; NEO supports {supported}")
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(f"{source} has partial_rotary_factor {partial}; NEO supports 1.0")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(rope_type, ())
    for name in needed:
        if name not in parameters:
            raise CheckpointError(f"config.json of {source}: rope type {rope_type} needs {name}, which is missing")
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    return RopeSpec(
        type=rope_type,
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        factor=float(parameters.get("factor") or 1.0),
        low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
        high_freq_factor=float(parameters.get("high_freq_factor") or 1.0),
        original_max_position=int(original or shape.max_position),
    )


def _dtype(config: Config, source: str) -> DType:
    """What the config says, and float32 where it says nothing, as transformers does."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    for dtype in get_args(DType):
        if dtype == name:
            return dtype  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"{source} is stored as {name}; NEO supports {', '.join(get_args(DType))}")


def _eos_ids(config: Config) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
