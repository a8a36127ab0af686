"""Points in a stream's work, on the host's time axis."""

from __future__ import annotations

import time

import torch

from neoserve import _native
from neoserve.device.base import Copy, Flag, Mark, Transfer
from neoserve.device.cuda import CudaDevice

SLACK_NS = 200_000


def test_marks_lie_between_the_host_times_around_them(device: CudaDevice) -> None:
    marks: list[Mark] = []

    def work() -> None:
        marks.append(device.mark())
        torch.cuda._sleep(20_000_000)
        marks.append(device.mark())

    device.submit(lambda: None).wait()
    before_ns = time.monotonic_ns()
    device.submit(work).wait()
    after_ns = time.monotonic_ns()
    begin_ns, end_ns = device.times_ns(marks)
    assert end_ns - begin_ns > 1_000_000
    assert before_ns - SLACK_NS < begin_ns
    assert end_ns < after_ns + SLACK_NS


def test_who_watches_is_told_of_both_copies_of_an_exchange(device: CudaDevice) -> None:
    words = device.pinned((128,), torch.int32)
    ready, done = Flag(words.data_ptr()), Flag(words.data_ptr() + 256)
    slot_out, slot_back = device.pinned((1024,), torch.int32), device.pinned((1024,), torch.int32)
    source = torch.arange(1024, dtype=torch.int32, device=device.torch_device)
    target = torch.zeros_like(source)
    copies: list[Copy] = []
    exchange = device.exchange(1, Transfer(source, slot_out), ready, done, Transfer(slot_back, target))

    def carry_out(value: int) -> None:
        exchange.begin(value)
        exchange.finish()

    _native.flag_raise(done.address, 1)
    device.submit(lambda: carry_out(1)).wait()
    device.on_copy = copies.append
    before_ns = time.monotonic_ns()
    completion = device.submit(lambda: carry_out(2))
    time.sleep(0.01)
    raised_ns = time.monotonic_ns()
    _native.flag_raise(done.address, 2)
    completion.wait()
    device.on_copy = None
    assert [(copy.what, copy.channel) for copy in copies] == [("out", 1), ("back", 1)]
    out, back = copies
    times_ns = device.times_ns([out.begin, out.end, back.begin, back.end])
    assert times_ns == sorted(times_ns)
    assert before_ns - SLACK_NS < times_ns[0]
    assert times_ns[1] < raised_ns < times_ns[3] + SLACK_NS
