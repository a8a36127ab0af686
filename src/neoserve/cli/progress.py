"""Steps of loading, one line each, for people who wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def progress_lines() -> Callable[[str], None]:
    """A function that writes each step to standard error with the seconds since the first."""
    start_s = time.monotonic()

    def show(text: str) -> None:
        print(f"[{time.monotonic() - start_s:5.1f} s] {text}", file=sys.stderr, flush=True)

    return show
