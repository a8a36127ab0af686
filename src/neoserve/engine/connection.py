"""The engine's child process and the socket to it, as the front end holds them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import zmq
import zmq.asyncio

from neoserve.engine.messages import FromEngine, Stop, ToEngine, decode_from_engine, encode

log = logging.getLogger(__name__)

_STOP_S = 10.0  # how long an engine process may take to end before it is killed
_LAST_WORDS_S = 0.5  # how long a message of a process that has ended may still be on its way


class EngineProcess:
    """The child process and the sockets to it."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, directory: Path) -> None:
        self.process = process
        self._socket = socket
        self._directory = directory

    @classmethod
    async def spawn(cls) -> EngineProcess:
        """Start the process; it waits for `Start`."""
        directory = Path(tempfile.mkdtemp(prefix="neo-"))
        address = f"ipc://{directory}/engine"
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.bind(address)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "neoserve.engine.process", address, stdin=asyncio.subprocess.PIPE
            )
        except BaseException:
            _clean_up(socket, directory)
            raise
        return cls(process, socket, directory)

    def send(self, message: ToEngine) -> None:
        """Queue `message`; never blocks."""
        self._socket.send(encode(message))

    async def receive(self) -> FromEngine:
        """The next message."""
        return decode_from_engine(await self._socket.recv())

    async def receive_or_end(self) -> FromEngine | None:
        """The next message, or `None` when the process has ended and said nothing more."""
        receiving = asyncio.ensure_future(self.receive())
        ended = asyncio.ensure_future(self.process.wait())
        try:
            await asyncio.wait({receiving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():  # what it said last may still be on its way
                await asyncio.wait({receiving}, timeout=_LAST_WORDS_S)
            return receiving.result() if receiving.done() else None
        finally:
            receiving.cancel()
            ended.cancel()

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        if self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        """Ask the process to stop, kill it when it does not, and clean up."""
        if self.process.returncode is None:
            self.send(Stop())
            try:
                await asyncio.wait_for(self.process.wait(), _STOP_S)
            except TimeoutError:
                log.warning("the engine process did not stop within %g s and is killed", _STOP_S)
                self.kill()
                await self.process.wait()
        _clean_up(self._socket, self._directory)


def _clean_up(socket: zmq.asyncio.Socket, directory: Path) -> None:
    socket.close(linger=0)
    shutil.rmtree(directory, ignore_errors=True)
