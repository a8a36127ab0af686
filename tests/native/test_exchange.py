"""The calls of a hand-off, and their order."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from neoserve.device.base import Transfer
from neoserve.device.exchange import StreamExchange

from .cpu_driver import STREAM, CpuDriver

COMPUTE, SENT, BACK, READY, DONE = 1, 11, 12, 2**40, 2**41


def test_copies_are_tied_to_the_flags_and_to_the_compute_stream_each_time() -> None:
    driver = CpuDriver()
    q, slot, out, attn = (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 4))
    channel = SimpleNamespace(
        index=1,
        stream=SimpleNamespace(cuda_stream=STREAM),
        sent=SimpleNamespace(cuda_event=SENT),
        back=SimpleNamespace(cuda_event=BACK),
    )
    transfers = Transfer(q, slot), Transfer(out, attn)
    exchange = StreamExchange(SimpleNamespace(on_copy=None), driver, COMPUTE, channel, transfers, (READY, DONE))
    for value in (1, 7, 2**31 - 1):
        driver.log.clear()
        q.fill_(value)
        out.fill_(-value)
        exchange.begin(value)
        assert driver.log == [
            ("record", SENT, COMPUTE),
            ("wait", STREAM, SENT),
            ("copy", q.nbytes, STREAM),
            ("write", STREAM, READY, value),
            ("await", STREAM, DONE, value),
            ("copy", out.nbytes, STREAM),
            ("record", BACK, STREAM),
        ]
        assert torch.equal(slot, q)
        assert torch.equal(attn, out)
        exchange.finish()
        assert driver.log[-1] == ("wait", COMPUTE, BACK)
