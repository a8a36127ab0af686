"""What keeps the memory busy between kernels: programmatic dependent launch, and fetching weights ahead, in Triton.

A kernel launched dependently starts while its predecessor in the stream still runs. Its programs must wait before they
read or write anything that an earlier kernel touches, so that the end of a kernel implies the end of all before it.
Weights, which nothing writes, may be fetched before.

Shape letters: N outputs, K inputs of a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LINE_VALUES: tl.constexpr = tl.constexpr(64)
"""16-bit values of a cache line."""

launch_dependents = gdc_launch_dependents
"""Let the next kernel start once all programs of this one have called this or ended."""

wait_for_predecessor = gdc_wait
"""Wait until the kernel before is done and its writes are visible."""


@triton.jit  # type: ignore[untyped-decorator]
def fetch_ahead(  # type: ignore[no-untyped-def]
    weight_ptr,
    num_outputs,
    num_inputs,
    split_inputs,
    program,
    num_programs,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program's share of bringing, of each row of a weight, the first COLUMNS values of each split to the L2 cache.

    num_outputs must be a multiple of ROWS, and num_inputs - COLUMNS lie in the last split.
    """
    lines = _LINE_VALUES * tl.arange(0, COLUMNS // _LINE_VALUES)[None, :]
    for first in range(program * ROWS, num_outputs, num_programs * ROWS):
        rows = weight_ptr + (first + tl.arange(0, ROWS)[:, None]).to(tl.int64) * num_inputs
        for split in range(0, num_inputs, split_inputs):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [(rows + split + lines).to(tl.uint64, bitcast=True)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
