"""`make demo`, apart from the build."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


def test_the_demo_answers_rightly_on_one_screen_with_both_tiers() -> None:
    shown = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=180, check=True).stdout
    assert re.search(r"What is 17 \+ 25\? +17 \+ 25 = 42", shown)
    assert re.search(r"Spell the word window\. +w-i-n-d-o-w", shown)
    assert all(int(count) > 0 for count in re.findall(r"tier: +(\d+) tokens", shown))
    assert len(re.findall(r"tier: +(\d+) tokens", shown)) == 2
    assert len(shown.splitlines()) < 40
