"""What a checkpoint's config says, as frozen values: everything that is needed to build the decoder but the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neoserve.core.config import DType, ModelShape

RopeType = Literal["default", "linear", "dynamic", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of a model.

    theta: base of the wavelengths. factor: by how much the scaled types stretch the context ("default": 1).
    low_freq_factor, high_freq_factor, original_max_position: only "llama3" reads them.
    """

    type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model without its weights.

    family: the name in the family table. dtype: what the checkpoint is stored in.
    qkv_bias, output_bias, mlp_bias: whether these linear layers have biases. qk_norm: RMS norm of each q and k head.
    eos_ids: ids that end a sequence. default_sampling: values of generation_config.json that replace our defaults, as
    (name, value) with names of `SamplingParams`.
    """

    family: str
    shape: ModelShape
    rope: RopeSpec
    norm_eps: float
    dtype: DType
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]
    default_sampling: tuple[tuple[str, float], ...]
