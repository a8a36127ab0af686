"""`neo bench latency`: requests that arrive over time, at one rate or at several."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from neoserve.cli.load.options import LoadOptions, load_options
from neoserve.cli.progress import progress_lines
from neoserve.core.config import EngineConfig
from neoserve.core.errors import ConfigError

_PANEL = "Arrivals"


class Arrivals(Enum):
    """When requests arrive."""

    POISSON = "poisson"
    TRACE = "trace"


@load_options
def latency(
    config: EngineConfig,
    load: LoadOptions,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rate", "--rates",
            help="Requests a second, one figure or several as in 0.2,0.4,0.8; each is a run.",
            show_default=False, rich_help_panel=_PANEL,
        ),
    ] = None,
    arrivals: Annotated[
        Arrivals,
        typer.Option(
            help="'poisson', or 'trace': as recorded in the file of lengths, stretched to the rate if one is given.",
            rich_help_panel=_PANEL,
        ),
    ] = Arrivals.POISSON,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency against rate into this PNG.", rich_help_panel=_PANEL)
    ] = None,
) -> None:  # fmt: skip
    """Let requests arrive over time and measure how long they wait; a preset gets random weights."""
    from neoserve.cli.load.curve import check_plot, draw_curve, print_curve
    from neoserve.cli.load.session import Case, Session
    from neoserve.cli.load.tables import print_tables
    from neoserve.cli.load.workload import parse_rates

    given = parse_rates(rates)
    if arrivals is Arrivals.POISSON and not given:
        raise ConfigError("there is no rate; give --rate, or --arrivals trace with a trace's --lengths")
    if plot is not None:
        check_plot(plot, given)
    cases = []
    for workload in [spec.load(config.seed) for spec in load.specs]:
        for rate in given or (None,):
            if arrivals is Arrivals.TRACE or rate is None:
                cases.append(Case(workload, workload.recorded_s(rate), rate))
            else:
                cases.append(Case(workload, workload.poisson_s(rate, config.seed), rate))
    outcomes = Session(config, load, cases, progress_lines()).run()
    print_tables(outcomes)
    if len(given) > 1:
        print_curve(outcomes)
    if plot is not None:
        draw_curve(outcomes, plot)
