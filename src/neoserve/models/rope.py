"""The table of rotary angles: one row per position, cosines then sines.

The types differ only in the inverse frequencies:

    default   theta ** (-2 i / D)                                    Su et al., RoFormer, arXiv 2104.09864
    linear    default / factor                                       Chen et al., arXiv 2306.15595
    dynamic   default. Its base grows only past max_position_embeddings, and then for every position at once, which
              would invalidate keys that are already in the KV. NEO serves up to max_position_embeddings, where
              transformers leaves the base alone too.
    llama3    low frequencies / factor, high ones kept, a linear ramp between: the Llama 3.1 model card's reference
"""

from __future__ import annotations

import math

import torch

from neoserve.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2] on the CPU."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "linear":
        return inverse / rope.factor
    if rope.type == "llama3":
        return _llama3(inverse, rope)
    return inverse


def _llama3(inverse: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    wavelength = 2 * math.pi / inverse
    ramp = rope.original_max_position / wavelength - rope.low_freq_factor
    kept = (ramp / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * inverse / rope.factor + kept * inverse


def rope_cache(rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """`cache_PD`, float32 [num_positions, head_dim]: D/2 cosines, then D/2 sines of position x inverse frequency."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim).to(device))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
