"""Programmatic dependent launch in Triton: a kernel starts while its predecessor in the stream still runs, so that no
time passes between small kernels (compute capability 9.0 on).

Every program of a kernel that is launched so must wait before it reads or writes what an earlier kernel touches. Then
the end of a kernel implies the end of all before it, and none needs to know who comes before its predecessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit  # type: ignore[untyped-decorator]
def follow_predecessor(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the launch is DEPENDENT: let the next kernel start once all programs of this one are here or have ended,
    then wait until the kernel before is done and its writes are visible."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
