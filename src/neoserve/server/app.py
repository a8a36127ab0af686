"""`neo serve`: the HTTP server around an engine process."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

import neoserve
from neoserve.core.config import EngineConfig
from neoserve.core.errors import ConfigError
from neoserve.engine.remote import RemoteEngine
from neoserve.server.api import Api
from neoserve.server.errors import install_error_handlers
from neoserve.server.middleware import ApiKeyGuard, BodyLimit

log = logging.getLogger(__name__)

_LOOPBACK = ("127.", "localhost", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """How the server meets the network.

    served_model_names: under which the model is known; empty for the engine's own name of it.
    drain_timeout_s: how long open requests may still take after SIGTERM. max_body_bytes: of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    drain_timeout_s: float = 60.0
    max_body_bytes: int = 16 * 2**20
    access_log: bool = True


def build_app(engine: RemoteEngine, config: ServerConfig) -> FastAPI:
    """The ASGI application around `engine`."""
    app = FastAPI(title="NEO", version=neoserve.__version__)
    names = config.served_model_names or (engine.info.config.model_name,)
    app.include_router(Api(engine, names).router())
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(ApiKeyGuard, keys=config.api_keys)
    return app


async def serve(engine_config: EngineConfig, config: ServerConfig, progress: Callable[[str], None]) -> None:
    """Load the engine and serve until SIGTERM or SIGINT, then finish what is open.

    Raises `ConfigError` when the address is taken or the engine cannot start, `EngineDeadError` when it dies doing so.
    """
    listener = _bind(config)
    if not config.host.startswith(_LOOPBACK) and not config.api_keys:
        log.warning(
            "%s is open to the network and no --api-key is set: anyone who can reach it can use it", config.host
        )
    with listener:
        engine = await RemoteEngine.start(engine_config, progress)
        try:
            await _serve_http(engine, config, listener, progress)
        finally:
            await engine.close()


async def _serve_http(
    engine: RemoteEngine, config: ServerConfig, listener: socket.socket, progress: Callable[[str], None]
) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(engine, config),
            log_config=None,
            access_log=config.access_log,
            lifespan="off",
            timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
        )
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn drains on these signals and then raises them again for whoever handled them before: nobody, here.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    progress(f"serving {engine.info.config.model_name} on http://{f'[{host}]' if ':' in host else host}:{port}")
    await server.serve([listener])


def _bind(config: ServerConfig) -> socket.socket:
    """Take the address before the model is loaded, so that a mistake shows at once; nobody can connect yet."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot serve on {config.host} port {config.port}: {error}; try another --port") from error
    return listener


def run(engine_config: EngineConfig, config: ServerConfig, progress: Callable[[str], None]) -> None:
    """`serve` in an event loop of its own."""
    asyncio.run(serve(engine_config, config, progress))
