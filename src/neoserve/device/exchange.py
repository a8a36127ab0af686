"""Hand-offs by stream memory operations: neither Python nor a waiting thread between the device and the worker pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neoserve._native import DriverCalls
from neoserve.device.base import Copy, Device, Transfer
from neoserve.device.driver import Driver
from neoserve.device.events import EventMark

_VALUE_ARGUMENT = 2
"""Of a write or a wait of a value."""


class Channel:
    """A stream for the hand-offs of one sub-batch, and the events that tie it to the compute stream."""

    def __init__(self, index: int, device: torch.device) -> None:
        self.index = index
        self.stream = torch.cuda.Stream(device)
        self.sent = torch.cuda.Event()
        self.back = torch.cuda.Event()
        for event in (self.sent, self.back):
            event.record(self.stream)  # torch makes an event when it is first recorded


class StreamExchange:
    """As `Exchange`, by one native call each way: every layer of a pipelined lap has one.

    transfers: outward and back. flags: addresses of `ready` and `done` on the device. While a CUDA graph is captured,
    it keeps the value.
    """

    def __init__(
        self,
        device: Device,
        driver: Driver,
        compute: int,
        channel: Channel,
        transfers: tuple[Transfer, Transfer],
        flags: tuple[int, int],
    ) -> None:
        self._device = device
        self._driver = driver
        self._compute = compute
        self._channel = channel
        self._transfers = transfers
        self._flags = flags
        self._begin = self._calls()
        self._finish = DriverCalls([driver.wait_event(compute, channel.back.cuda_event)])

    def begin(self, value: int) -> None:
        calls, channel, watcher = self._begin, self._channel, self._device.on_copy
        if watcher is not None:
            marks = [EventMark.on(channel.stream) for _ in range(4)]  # torch makes an event when it is first recorded
            calls = self._calls(marks)
            watcher(Copy("out", channel.index, *marks[:2]))
            watcher(Copy("back", channel.index, *marks[2:]))
        self._driver.run(calls, value)

    def finish(self) -> None:
        self._driver.run(self._finish)

    def _calls(self, marks: Sequence[EventMark] = ()) -> DriverCalls:
        """What `begin` makes with the value to move by; `marks` before and after each copy."""
        driver, channel = self._driver, self._channel
        stream, sent = channel.stream.cuda_stream, channel.sent.cuda_event
        ready, done = self._flags
        (copy_out, copy_back) = (
            [driver.copy(transfer.target.data_ptr(), transfer.source.data_ptr(), transfer.source.nbytes, stream)]
            for transfer in self._transfers
        )
        if marks:
            begin_out, end_out, begin_back, end_back = (driver.record_event(m.event.cuda_event, stream) for m in marks)
            copy_out, copy_back = [begin_out, *copy_out, end_out], [begin_back, *copy_back, end_back]
        before = [driver.record_event(sent, self._compute), driver.wait_event(stream, sent), *copy_out]
        flags = [driver.write_value(stream, ready, 0), driver.wait_value(stream, done, 0)]
        after = [*copy_back, driver.record_event(channel.back.cuda_event, stream)]
        values = [(len(before) + index, _VALUE_ARGUMENT, 0) for index in range(len(flags))]
        return DriverCalls([*before, *flags, *after], arguments=values)
