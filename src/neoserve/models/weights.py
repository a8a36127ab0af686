"""The weights of a decoder: fused tensors, and how they are filled from safetensors or at random.

Every tensor of a checkpoint is a view into one of ours (`named_parameters`), so loading is one copy a tensor, straight
to its place on the device, in the target dtype; nothing is ever held twice.

Shape letters: C fused heads (H query, then K key, then K value heads), D head dim, E model dim, F ffn dim,
V vocabulary. Linear weights are [out, in], as torch has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from neoserve.core.errors import CheckpointError
from neoserve.models.spec import ModelSpec

DUMMY_STD = 0.02  # transformers' initializer_range: activations stay finite in fp16 at any depth we know of
NAMES_IN_MESSAGE = 5


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Rows of `qkv` are C x D, of `gate_up` 2 x F (gate, then up); absent biases are `None`."""

    input_norm_E: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm_E: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights on one device. `head_VE` is `embedding_VE` itself where the model ties them."""

    embedding_VE: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_E: torch.Tensor
    head_VE: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.embedding_VE, self.final_norm_E]
        tensors += [] if self.head_VE is self.embedding_VE else [self.head_VE]
        for layer in self.layers:
            values = (getattr(layer, field.name) for field in fields(layer))
            tensors += [value for value in values if value is not None]
        return sum(tensor.nbytes for tensor in tensors)


def load_weights(spec: ModelSpec, path: Path, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """The weights in the safetensors files of directory `path`.

    Raises `CheckpointError`, with names, for tensors that are missing, unexpected or of another shape.
    """
    weights = allocate(spec, dtype, device)
    missing = named_parameters(spec, weights)
    unexpected: list[str] = []
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if (parameter := missing.pop(name, None)) is not None:
                        _copy(parameter, tensors.get_tensor(name), name, path)
                    elif not _is_derived(name, spec):
                        unexpected.append(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit its config.json ({spec.family}): "
            f"missing {_listed(list(missing))}; unexpected {_listed(unexpected)}"
        )
    return weights


def dummy_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0) -> DecoderWeights:
    """Random weights, made on the device: normal with `DUMMY_STD`, norms 1, biases 0; equal for equal seeds."""
    weights = allocate(spec, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in named_parameters(spec, weights).items():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=DUMMY_STD, generator=generator)
    return weights


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Weights of the right shapes with nothing in them yet."""
    shape = spec.shape

    def empty(*size: int, present: bool = True) -> torch.Tensor | None:
        return torch.empty(size, dtype=dtype, device=device) if present else None

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    query_size = shape.num_query_heads * shape.head_dim
    qkv_size = query_size + 2 * shape.num_kv_heads * shape.head_dim
    layers = tuple(
        LayerWeights(
            input_norm_E=tensor(shape.hidden_size),
            qkv=tensor(qkv_size, shape.hidden_size),
            qkv_bias=empty(qkv_size, present=spec.qkv_bias),
            q_norm_D=empty(shape.head_dim, present=spec.qk_norm),
            k_norm_D=empty(shape.head_dim, present=spec.qk_norm),
            output=tensor(shape.hidden_size, query_size),
            output_bias=empty(shape.hidden_size, present=spec.output_bias),
            post_norm_E=tensor(shape.hidden_size),
            gate_up=tensor(2 * shape.ffn_size, shape.hidden_size),
            gate_up_bias=empty(2 * shape.ffn_size, present=spec.mlp_bias),
            down=tensor(shape.hidden_size, shape.ffn_size),
            down_bias=empty(shape.hidden_size, present=spec.mlp_bias),
        )
        for _ in range(shape.num_layers)
    )
    embedding_VE = tensor(shape.vocab_size, shape.hidden_size)
    return DecoderWeights(
        embedding_VE=embedding_VE,
        layers=layers,
        final_norm_E=tensor(shape.hidden_size),
        head_VE=embedding_VE if shape.tied_embeddings else tensor(shape.vocab_size, shape.hidden_size),
    )


def named_parameters(spec: ModelSpec, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Every tensor that the checkpoint must hold, by its name there, as a view into `weights`."""
    parameters = {"model.embed_tokens.weight": weights.embedding_VE, "model.norm.weight": weights.final_norm_E}
    if not spec.shape.tied_embeddings:
        parameters["lm_head.weight"] = weights.head_VE
    for index, layer in enumerate(weights.layers):
        for name, parameter in _layer_parameters(spec, layer):
            if parameter is not None:
                parameters[f"model.layers.{index}.{name}"] = parameter
    return parameters


def _layer_parameters(spec: ModelSpec, layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor | None]]:
    shape = spec.shape
    heads = {"q_proj": shape.num_query_heads, "k_proj": shape.num_kv_heads, "v_proj": shape.num_kv_heads}
    rows = {name: count * shape.head_dim for name, count in heads.items()}
    yield from _fused("self_attn", rows, layer.qkv, layer.qkv_bias)
    yield from _fused("self_attn", {"o_proj": shape.hidden_size}, layer.output, layer.output_bias)
    halves = {"gate_proj": shape.ffn_size, "up_proj": shape.ffn_size}
    yield from _fused("mlp", halves, layer.gate_up, layer.gate_up_bias)
    yield from _fused("mlp", {"down_proj": shape.hidden_size}, layer.down, layer.down_bias)
    yield "self_attn.q_norm.weight", layer.q_norm_D
    yield "self_attn.k_norm.weight", layer.k_norm_D
    yield "input_layernorm.weight", layer.input_norm_E
    yield "post_attention_layernorm.weight", layer.post_norm_E


def _fused(
    module: str, rows: dict[str, int], weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The parts, `rows` rows each, of a fused linear layer."""
    sizes = list(rows.values())
    for name, part in zip(rows, torch.split(weight, sizes), strict=True):
        yield f"{module}.{name}.weight", part
    if bias is not None:
        for name, part in zip(rows, torch.split(bias, sizes), strict=True):
            yield f"{module}.{name}.bias", part


def _weight_files(path: Path) -> list[Path]:
    """The files of the index where there is one, else every safetensors file of the directory."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} holds no *.safetensors; NEO reads weights in no other format")
        return files
    try:
        files = [
            path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of safetensors files: {error!r}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index} names files that are not there: {_listed(absent)}")
    return files


def _copy(parameter: torch.Tensor, tensor: torch.Tensor, name: str, path: Path) -> None:
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensor.shape)}; its config.json asks for {list(parameter.shape)}"
        )
    parameter.copy_(tensor)


def _is_derived(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor that we do not load says nothing new: tables that old files keep, the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.shape.tied_embeddings)


def _listed(names: list[str]) -> str:
    if len(names) > NAMES_IN_MESSAGE:
        return f"{', '.join(names[:NAMES_IN_MESSAGE])} and {len(names) - NAMES_IN_MESSAGE} more"
    return ", ".join(names) or "none"
