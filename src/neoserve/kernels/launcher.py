"""Launches of Triton kernels from where Python's time counts: between the attentions of a lap that is not recorded.

`kernel[grid](...)` looks at every argument of every launch to find which of its compilations fits. Where one fits all
launches with the same constants, it is enough to look once, which halves what a launch takes.
"""

from __future__ import annotations

from typing import Any

import torch


class Launcher:
    """Launches one kernel (`triton.jit`), whose constants come last.

    options: Triton's, such as `num_warps`. All launches with the same constants, and the same device and dtype of the
    first argument, must fit one compilation. Triton compiles for what it sees in the first of them: the other dtypes,
    addresses that are multiples of 16, and integers that are, or are 1, unless `do_not_specialize` names them.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel = kernel
        self._options = options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], first: torch.Tensor, *others: Any, constants: tuple[Any, ...], **options: Any
    ) -> None:
        """Enqueue on the current stream. `options` must follow from `constants`."""
        self.compiled(first, *others, constants=constants, **options)[grid](first, *others, *constants)

    def compiled(self, first: torch.Tensor, *others: Any, constants: tuple[Any, ...], **options: Any) -> Any:
        """The compilation that fits these arguments, for who launches it often: `compiled[grid](*arguments,
        *constants)` on the current stream. It is loaded, so that its first launch may be captured."""
        key = (first.device, first.dtype, constants)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._kernel.warmup(first, *others, *constants, grid=(1, 1, 1), **self._options, **options)
            self._compiled[key] = compiled
            compiled[1, 1, 1]  # Triton loads it when it is first given a grid
        return compiled
