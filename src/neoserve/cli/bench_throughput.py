"""`neo bench throughput`: all requests at the start."""

from __future__ import annotations

from neoserve.cli.load.options import LoadOptions, load_options
from neoserve.cli.progress import progress_lines
from neoserve.core.config import EngineConfig


@load_options
def throughput(config: EngineConfig, load: LoadOptions) -> None:
    """Give an engine all requests at once and measure how fast it finishes them; a preset gets random weights."""
    from neoserve.cli.load.session import Case, Session
    from neoserve.cli.load.tables import print_tables

    workloads = [spec.load(config.seed) for spec in load.specs]
    cases = [Case(workload, (0.0,) * len(workload.rows)) for workload in workloads]
    print_tables(Session(config, load, cases, progress_lines()).run())
