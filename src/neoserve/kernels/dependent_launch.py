"""Programmatic dependent launch in Triton: a kernel starts while its predecessor in the stream still runs.

Every program of a kernel launched so must wait before it reads or writes anything that an earlier kernel touches, so
that the end of a kernel implies the end of all before it. Weights, which nothing writes, may be fetched before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LINE_VALUES: tl.constexpr = tl.constexpr(64)
"""16-bit values of a cache line."""


@triton.jit  # type: ignore[untyped-decorator]
def launch_dependents_and_prefetch(rows, NUM_VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start, and ask for the first values at the pointers `rows` [N, 1] to come to the L2 cache."""
    gdc_launch_dependents()
    if NUM_VALUES > 0:
        lines = rows + _LINE_VALUES * tl.arange(0, NUM_VALUES // _LINE_VALUES)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [lines.to(tl.uint64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_predecessor():  # type: ignore[no-untyped-def]
    """Wait until the kernel before is done and its writes are visible."""
    gdc_wait()
