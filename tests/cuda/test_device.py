"""Streams, flags and pinned memory of the GPU."""

import mmap
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from neoserve.core.errors import ConfigError
from neoserve.device.base import Flag
from neoserve.device.cuda import CudaDevice, usable_dtype

from .conftest import attention_shape


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(attention_shape(8, 2, 64), usable_dtype("bfloat16"), 16)
    yield device
    device.close()


def test_work_runs_in_order_and_completes(device: CudaDevice) -> None:
    x = torch.zeros(1 << 20, device=device.torch_device)
    device.submit(lambda: [x.add_(1) for _ in range(100)] and None)
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


def test_a_stream_waits_for_a_flag_that_the_host_raises(device: CudaDevice) -> None:
    words = device.pinned((64,), torch.int32)
    flag = Flag(words.data_ptr())
    completion = device.submit(lambda: device.wait_flag(flag, 3))
    time.sleep(0.05)
    assert not completion.done()
    words[0] = 2
    time.sleep(0.05)
    assert not completion.done()
    words[0] = 4
    completion.wait()


def test_a_raised_flag_follows_the_data_before_it(device: CudaDevice) -> None:
    words = device.pinned((128,), torch.int32)
    slot = device.pinned((1 << 16,), torch.int32)
    ready, done = Flag(words.data_ptr()), Flag(words.data_ptr() + 256)
    source = torch.zeros(1 << 16, dtype=torch.int32, device=device.torch_device)
    seen: list[bool] = []

    def answer() -> None:
        for value in range(1, 101):
            while int(words[0]) < value:
                time.sleep(0)
            seen.append(bool((slot == value).all()))
            words[64] = value

    def work() -> None:
        for value in range(1, 101):
            source.fill_(value)
            slot.copy_(source, non_blocking=True)
            device.raise_flag(ready, value)
            device.wait_flag(done, value)

    worker = threading.Thread(target=answer)
    worker.start()
    device.submit(work).wait()
    worker.join()
    assert seen == [True] * 100


def test_flags_in_a_captured_graph_work_in_every_replay(device: CudaDevice) -> None:
    words = device.pinned((128,), torch.int32)
    ready, done = Flag(words.data_ptr()), Flag(words.data_ptr() + 256)
    x = torch.zeros(4, device=device.torch_device)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            x.add_(1)
            device.raise_flag(ready, 1)
            device.wait_flag(done, 1)
            x.mul_(2)

    device.submit(capture).wait()
    for expected in (2.0, 6.0):
        words[0] = words[64] = 0
        completion = device.submit(graph.replay)
        while int(words[0]) < 1:
            time.sleep(0)
        assert not completion.done()
        words[64] = 1
        completion.wait()
        assert x.tolist() == [expected] * 4


def test_copies_run_after_earlier_compute_and_before_who_waits_for_them(device: CudaDevice) -> None:
    x = torch.zeros(1 << 24, device=device.torch_device)
    y = torch.zeros_like(x)

    def compute() -> None:
        for _ in range(200):
            x.add_(1)

    device.submit(compute)
    copied = device.submit_copies(lambda: y.copy_(x) and None)

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
    device.submit(lambda: host.copy_(source, non_blocking=True) and None).wait()
    assert torch.equal(host, source.cpu())


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
