"""The engine process: `EngineCore` alone in a process, driven by messages from a front end.

Started by `engine.remote.RemoteEngine` as `python -m neoserve.engine.process ADDRESS`, with a pipe as its standard
input that closes when the front end is gone, however it died.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback

import zmq

from neoserve.core.errors import ConfigError, InvalidRequestError, NeoError, QueueFullError
from neoserve.core.logs import log_to_stderr
from neoserve.engine.core import EngineCore
from neoserve.engine.messages import (
    Abort,
    Accepted,
    Add,
    AskStats,
    Events,
    FromEngine,
    Progress,
    Ready,
    Refused,
    Start,
    StartFailed,
    Stats,
    Stop,
    ToEngine,
    decode_to_engine,
    describe,
    encode,
)


class EngineLoop:
    """Reads messages between iterations; sleeps on the socket while there is no work."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def run(self) -> None:
        """Serve until the front end says `Stop`."""
        core = self._start()
        if core is None:
            return
        try:
            while self._read_inbox(core):
                if core.has_work:
                    self._step(core)
        finally:
            core.close()

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))

    def _receive(self) -> ToEngine:
        return decode_to_engine(self._socket.recv())

    def _start(self) -> EngineCore | None:
        start = self._receive()
        if not isinstance(start, Start):
            raise RuntimeError(f"the first message was {type(start).__name__}; expected Start")
        try:
            core = EngineCore(start.config, progress=lambda text: self._send(Progress(text)))
        except ConfigError as error:
            self._send(StartFailed(describe(error)))
            return None
        except Exception as error:
            traceback.print_exc()
            self._send(StartFailed(describe(NeoError(f"the engine failed to start: {type(error).__name__}: {error}"))))
            return None
        gc.collect()
        gc.freeze()  # the model's objects stay: to look through them again and again would delay iterations
        self._send(Ready(core.info))
        return core

    def _read_inbox(self, core: EngineCore) -> bool:
        """Handle what has arrived, waiting for it when there is nothing else to do; false to end."""
        while not core.has_work or self._socket.poll(0):
            message = self._receive()
            match message:
                case Add():
                    self._send(_add(core, message))
                case Abort():
                    for request_id in message.request_ids:
                        core.abort(request_id)
                case AskStats():
                    self._send(Stats(message.ticket, core.stats()))
                case Stop():
                    return False
                case Start():
                    raise RuntimeError("Start came twice")
        return True

    def _step(self, core: EngineCore) -> None:
        events = core.step()
        if events:
            self._send(Events(events))
        if not core.has_work:
            core.check_integrity()


def _add(core: EngineCore, message: Add) -> Accepted | Refused:
    added = []
    try:
        for request in message.requests:
            core.add(request)
            added.append(request.request_id)
    except (InvalidRequestError, QueueFullError) as error:
        for request_id in added:
            core.abort(request_id)
        return Refused(message.ticket, describe(error))
    return Accepted(message.ticket)


def _end_with_front_end() -> None:
    """End this process, whatever it is doing, when the pipe from the front end closes."""
    os.read(0, 1)  # returns at the end of the pipe; nobody writes to it
    os._exit(1)


def main(address: str) -> None:
    """Connect to the front end and serve it."""
    log_to_stderr()
    # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group; the front end says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_front_end, name="front-end-watch", daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        EngineLoop(socket).run()
    finally:
        socket.close(linger=1000)
        context.term()


if __name__ == "__main__":
    main(sys.argv[1])
