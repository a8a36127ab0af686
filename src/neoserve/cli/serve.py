"""`neo serve`: the OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from neoserve.cli.progress import progress_lines
from neoserve.core.config import EngineConfig

_PANEL = "Server"


def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_PANEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", rich_help_panel=_PANEL)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; may be given several times.",
            envvar="NEO_API_KEY",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model in the API; may be given several times.", show_default=False, rich_help_panel=_PANEL
        ),
    ] = None,
    drain_timeout_s: Annotated[
        float, typer.Option(help="Seconds that open requests may take after SIGTERM.", rich_help_panel=_PANEL)
    ] = 60.0,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.", rich_help_panel=_PANEL)] = 16 * 2**20,
    disable_uvicorn_access_log: Annotated[
        bool, typer.Option("--disable-uvicorn-access-log", help="Do not log each request.", rich_help_panel=_PANEL)
    ] = False,
) -> None:
    """Serve a model to OpenAI clients."""
    from neoserve.server.app import ServerConfig, run

    server_config = ServerConfig(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_names=tuple(served_model_name or ()),
        drain_timeout_s=drain_timeout_s,
        max_body_bytes=max_body_bytes,
        access_log=not disable_uvicorn_access_log,
    )
    run(config, server_config, progress_lines())
