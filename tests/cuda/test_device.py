"""Streams, flags and pinned memory of the GPU."""

import mmap
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from neoserve.core.errors import ConfigError
from neoserve.device.base import Exchange, Flag, Transfer
from neoserve.device.cuda import CudaDevice

from .conftest import attention_shape


def do(*results: object) -> None:
    """Make a statement of expressions, for a lambda."""


def zeros(device: CudaDevice, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that are there: what is submitted does not wait for the stream on which torch makes them."""
    x = torch.zeros(size, dtype=dtype, device=device.torch_device)
    device.synchronise()
    return x


def test_work_runs_in_order_and_completes(device: CudaDevice) -> None:
    x = zeros(device, 1 << 20)

    def add() -> None:
        for _ in range(100):
            x.add_(1)

    device.submit(add)
    seen: list[torch.Tensor] = []
    completion = device.submit(lambda: seen.append(device.download(x[:4].mul_(2))))
    completion.wait()
    assert completion.done()
    assert completion.elapsed_us() > 0
    assert seen[0].tolist() == [200.0] * 4


def test_what_the_work_raises_comes_out_of_wait_and_the_stream_lives_on(device: CudaDevice) -> None:
    def fail() -> None:
        raise ValueError("no such block")

    with pytest.raises(ValueError, match="no such block"):
        device.submit(fail).wait()
    device.submit(lambda: None).wait()


def test_uploads_do_not_share_memory_with_their_source(device: CudaDevice) -> None:
    found: list[torch.Tensor] = []

    def work() -> None:
        array = np.arange(1000, dtype=np.int64)
        found.append(device.upload(array))
        array[:] = -1

    device.submit(work).wait()
    assert torch.equal(found[0].cpu(), torch.arange(1000))


class Slots:
    """A hand-off's memory: what goes out is `sent`, what comes back is `answer`; two flags."""

    def __init__(self, device: CudaDevice, size: int = 1 << 16) -> None:
        self.words = device.pinned((128,), torch.int32)
        self.sent = device.pinned((size,), torch.int32)
        self.answer = device.pinned((size,), torch.int32)
        self._device = device

    def exchange(self, channel: int, value: int, source: torch.Tensor, target: torch.Tensor) -> Exchange:
        """One that has begun."""
        ready, done = Flag(self.words.data_ptr()), Flag(self.words.data_ptr() + 256)
        back = Transfer(self.answer, target)
        exchange = self._device.exchange(channel, Transfer(source, self.sent), ready, done, back)
        exchange.begin(value)
        return exchange

    def wait_ready(self, value: int) -> None:
        deadline_s = time.monotonic() + 10
        while int(self.words[0]) < value:
            assert time.monotonic() < deadline_s, "the flag was not raised"
            time.sleep(0)

    def raise_done(self, value: int) -> None:
        self.words[64] = value


def test_exchanges_carry_the_data_of_their_time_both_ways(device: CudaDevice) -> None:
    slots = Slots(device)
    source = zeros(device, 1 << 16, dtype=torch.int32)
    results: list[torch.Tensor] = []
    seen: list[bool] = []

    def answer() -> None:
        for value in range(1, 101):
            slots.wait_ready(value)
            seen.append(bool((slots.sent == value).all()))
            slots.answer.fill_(10 * value)
            slots.raise_done(value)

    def work() -> None:
        for value in range(1, 101):
            target = torch.empty_like(source)
            exchange = slots.exchange(0, value, source.fill_(value).clone(), target)
            source.mul_(-1)
            exchange.finish()
            results.append(target + 1)

    worker = threading.Thread(target=answer)
    worker.start()
    device.submit(work).wait()
    worker.join()
    assert seen == [True] * 100
    assert all(bool((result == 10 * (i + 1) + 1).all()) for i, result in enumerate(results))


def test_an_exchange_can_begin_again(device: CudaDevice) -> None:
    slots = Slots(device)
    source, target = (zeros(device, 1 << 16, dtype=torch.int32) for _ in range(2))
    results: list[torch.Tensor] = []

    def work() -> None:
        exchange = slots.exchange(1, 1, source, target)
        for value in range(2, 21):
            exchange.finish()
            results.append(target.clone())
            source.add_(1)
            exchange.begin(value)
        exchange.finish()

    completion = device.submit(work)
    for value in range(1, 21):
        slots.wait_ready(value)
        assert (slots.sent == value - 1).all()
        slots.answer.fill_(7 * value)
        slots.raise_done(value)
    completion.wait()
    assert all(bool((result == 7 * (i + 1)).all()) for i, result in enumerate(results))
    assert (target == 7 * 20).all()


def test_compute_between_an_exchange_and_its_end_does_not_wait_for_it(device: CudaDevice) -> None:
    slots = Slots(device)
    source, target = (zeros(device, 1 << 16, dtype=torch.int32) for _ in range(2))
    exchanges: list[Exchange] = []
    device.submit(lambda: exchanges.append(slots.exchange(1, 3, source, target)))
    device.submit(lambda: do(source.add_(1))).wait()
    finish = device.submit(exchanges[0].finish)
    slots.raise_done(2)
    time.sleep(0.05)
    assert not finish.done()
    slots.raise_done(4)
    finish.wait()


def test_channels_do_not_wait_for_each_other(device: CudaDevice) -> None:
    slots = (Slots(device), Slots(device))
    x = [zeros(device, 1 << 16, dtype=torch.int32) for _ in range(4)]
    exchanges: list[Exchange] = []
    device.submit(lambda: exchanges.append(slots[0].exchange(0, 1, x[0], x[1])))
    device.submit(lambda: exchanges.append(slots[1].exchange(1, 1, x[2], x[3])))
    slots[1].raise_done(1)
    device.submit(exchanges[1].finish).wait()
    slots[0].raise_done(1)
    device.submit(exchanges[0].finish).wait()


def test_an_exchange_in_a_captured_graph_works_in_every_replay(device: CudaDevice) -> None:
    slots = Slots(device, size=4)
    x, y = (zeros(device, 4, dtype=torch.int32) for _ in range(2))
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            x.add_(1)
            exchange = slots.exchange(0, 1, x, y)
            exchange.finish()
            y.mul_(2)

    device.submit(capture).wait()
    for replay in (1, 2):
        slots.words.zero_()
        completion = device.submit(graph.replay)
        slots.wait_ready(1)
        assert slots.sent.tolist() == [replay] * 4
        assert not completion.done()
        slots.answer.fill_(7 * replay)
        slots.raise_done(1)
        completion.wait()
        assert y.tolist() == [14 * replay] * 4


def test_copies_run_after_earlier_compute_and_before_who_waits_for_them(device: CudaDevice) -> None:
    x, y = (zeros(device, 1 << 24) for _ in range(2))

    def compute() -> None:
        for _ in range(200):
            x.add_(1)

    device.submit(compute)
    copied = device.submit_copies(lambda: do(y.copy_(x)))

    def use() -> None:
        device.wait_for(copied)
        y.add_(1)

    device.submit(use).wait()
    assert y[0] == y[-1] == 201


def test_registered_memory_takes_copies_without_blocking(device: CudaDevice) -> None:
    memory = np.frombuffer(mmap.mmap(-1, 64 << 20), dtype=np.uint8)
    device.register(memory.ctypes.data, len(memory))
    host = torch.from_numpy(memory).view(torch.int32)
    assert host.is_pinned()
    source = torch.arange(host.numel(), dtype=torch.int32, device=device.torch_device)
    device.synchronise()
    device.submit(lambda: do(host.copy_(source, non_blocking=True))).wait()
    assert torch.equal(host, source.cpu())


@pytest.mark.parametrize("middle", [2**30, 2**31])
def test_whole_ranges_of_registered_memory_are_copied_at_once(device: CudaDevice, middle: int) -> None:
    """Also across multiples of a GiB, where memory is otherwise pinned part by part."""
    whole_bytes = (3 << 29) + 5000
    memory = np.frombuffer(mmap.mmap(-1, 2 * whole_bytes), dtype=np.uint8)
    device.register(memory.ctypes.data, len(memory), whole_bytes=whole_bytes)
    part = torch.from_numpy(memory)[middle - 4096 : middle + 4096]
    source = torch.full((8192,), 7, dtype=torch.uint8, device=device.torch_device)
    device.synchronise()
    device.submit(lambda: do(part.copy_(source, non_blocking=True))).wait()
    assert part.min() == 7


def test_memory_that_cannot_be_registered_is_an_error_and_leaves_nothing(device: CudaDevice) -> None:
    page = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, 16 * page), dtype=np.uint8)
    far_too_long = 4 << 30
    with pytest.raises(ConfigError, match="--host-memory"):
        device.register(memory.ctypes.data, far_too_long)
    device.register(memory.ctypes.data, len(memory))


def test_memory_figures_follow_allocations(device: CudaDevice) -> None:
    before = device.free_bytes()
    x = torch.zeros(1 << 30, dtype=torch.uint8, device=device.torch_device)
    assert before - device.free_bytes() >= x.numel()
    assert device.free_bytes() < device.total_bytes()


def test_there_is_no_such_gpu() -> None:
    with pytest.raises(ConfigError, match="no GPU 99"):
        CudaDevice(attention_shape(8, 2, 64), "float16", 16, index=99)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_earlier_recording_that_is_collected_does_not_end_the_next(device: CudaDevice, one_by_one: bool) -> None:
    x = zeros(device, 1 << 16)
    replays: list[object] = []

    def work() -> None:
        x.add_(1)
        do([[] for _ in range(100_000)])  # enough for the collector to run

    def record() -> None:
        replays.append(device.record(work, shared=True, one_by_one=one_by_one))

    device.submit(record).wait()
    replays.append(replays)
    replays = []
    device.submit(record).wait()


def recorded_one_by_one(device: CudaDevice, work: Callable[[], None]) -> Callable[[], None]:
    """A replay of `work`, which has run once before."""
    replays: list[Callable[[], None]] = []
    device.submit(work).wait()
    device.submit(lambda: replays.append(device.record(work, shared=True, one_by_one=True))).wait()
    return replays[0]


def test_work_recorded_one_by_one_is_done_again_in_order(device: CudaDevice) -> None:
    """Kernels of torch, of cuBLAS (in parts that are added up, which fills memory first) and of ours (which begin
    before their predecessors end), copies and fills."""
    torch.manual_seed(0)
    place = {"device": device.torch_device, "dtype": torch.bfloat16}
    weights = [torch.randn(512, 4096, **place), torch.randn(4096, 512, **place), torch.randn(8192, 4096, **place)]
    x = torch.randn(16, 4096, **place)
    halves, kept, zeroed = torch.empty(16, 2048, **place), torch.empty(16, 512, **place), torch.ones(64, **place)
    device.synchronise()

    def work() -> None:
        zeroed.zero_()
        y = x @ weights[0].T
        kept.copy_(y)
        halves.copy_(device.ops.linear_silu_and_mul((y @ weights[1].T).mul_(0.01), weights[2], None)[:, :2048])

    replay = recorded_one_by_one(device, work)
    for _ in range(3):
        x.normal_()
        torch.cuda.synchronize()
        device.submit(work).wait()
        expected = [tensor.clone() for tensor in (halves, kept)]
        for tensor in (halves, kept, zeroed):
            tensor.fill_(7)
        torch.cuda.synchronize()
        device.submit(replay).wait()
        assert torch.equal(halves, expected[0])
        assert torch.equal(kept, expected[1])
        assert not zeroed.any()


def test_recordings_replayed_one_by_one_lie_in_no_memory_of_the_device(device: CudaDevice) -> None:
    x = zeros(device, 1 << 16)
    replays = [recorded_one_by_one(device, lambda: do(x.add_(1)))]
    free_bytes = device.free_bytes()
    replays += [recorded_one_by_one(device, lambda: do(x.add_(1))) for _ in range(400)]
    for replay in replays:
        device.submit(replay)
    device.synchronise()
    assert x[0].item() == 2 * len(replays)
    assert free_bytes - device.free_bytes() < 8 * 2**20
