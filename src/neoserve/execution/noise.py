"""Randomness without state: noise is a hash of (seed, index of the token in its sequence, token id).

So a sequence's draws do not depend on what else is in the batch, on the order of laps or on the device. The hash is
SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the row's key is the state of its generator, and token id i takes the
generator's output number i.

Shape letters: B rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Uint64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
LARGEST_BELOW_1 = 1.0 - 2.0**-24  # of float32


def mix64(x: Uint64s) -> Uint64s:
    """SplitMix64's output function."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def row_keys(seeds_B: Uint64s, indices_B: Int64s) -> Int64s:
    """int64 keys of rows from seeds and the indices of the tokens that are drawn."""
    steps = (indices_B.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
    return mix64(mix64(seeds_B) + steps).view(np.int64)


def gumbel_noise(keys_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`noise_BV`, float32: standard Gumbel, of int64 keys on their device.

    argmax(logits + noise) draws from softmax(logits). Needs 16 bytes of scratch memory an element.
    """
    steps_V = torch.arange(1, vocab_size + 1, device=keys_B.device) * _signed(GAMMA)
    x = keys_B.unsqueeze(1) + steps_V
    x ^= _shift_right(x, 30)
    x *= _signed(MULTIPLIER_1)
    x ^= _shift_right(x, 27)
    x *= _signed(MULTIPLIER_2)
    # The upper 32 bits; the last xor of mix64 changes only one bit of them. A small uniform keeps its precision in
    # float32, a large one does not, so the likely draws (large Gumbel values) are made from the small uniforms.
    uniform_BV = _shift_right(x, 32).float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_BELOW_1)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64; torch multiplies int64 modulo 2**64."""
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
