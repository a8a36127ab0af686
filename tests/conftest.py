"""What every test runs under: one compute thread an engine, and measurements kept apart from the user's."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported here, and inherited by the servers that tests start: machines that test have few cores, and
# spinning threads of several engines would halve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NEO_CACHE_DIR"] = tempfile.mkdtemp(prefix="neo-test-cache-")
