"""Launches of captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, c_uint64, cast

import pytest
import torch

from neoserve.device.launches import ForLayers, Launches

from .cpu_driver import COPY, STREAM, CpuDriver


def add(target: int, what: int) -> None:
    """A kernel."""
    cast(target, POINTER(c_uint64))[0] += what


@pytest.fixture
def driver() -> CpuDriver:
    return CpuDriver()


@pytest.fixture
def layers() -> torch.Tensor:
    return torch.zeros(5, 4, dtype=torch.int64)


def for_layers(driver: CpuDriver, work: Callable[[torch.Tensor], None], layers: torch.Tensor) -> Callable[[int], None]:
    return ForLayers(Launches(driver), work, layers, STREAM)


def test_what_one_layer_enqueues_is_enqueued_at_the_others(driver: CpuDriver, layers: torch.Tensor) -> None:
    other = torch.zeros(1, dtype=torch.int64)
    num_called = 0

    def work(layer: torch.Tensor) -> None:
        nonlocal num_called
        num_called += 1
        driver.launch(add, layer[2:].data_ptr(), 7)
        driver.launch(add, other.data_ptr(), 1)
        driver.launch(add, layer[3:].data_ptr(), 5)

    enqueue = for_layers(driver, work, layers)
    for layer in (3, 1, 0, 4, 1):
        enqueue(layer)
    assert layers.tolist() == [[0, 0, 7, 5], [0, 0, 14, 10], [0, 0, 0, 0], [0, 0, 7, 5], [0, 0, 7, 5]]
    assert other.item() == 5
    assert (num_called, len(driver.log)) == (2, 15)


def test_what_has_no_address_in_the_layer_is_enqueued_by_python(driver: CpuDriver, layers: torch.Tensor) -> None:
    other = torch.zeros(1, dtype=torch.int64)
    enqueue = for_layers(driver, lambda layer: driver.launch(add, other.data_ptr(), 1), layers)
    for layer in range(5):
        enqueue(layer)
    assert other.item() == 5


def test_what_is_not_only_kernels_is_enqueued_by_python(driver: CpuDriver, layers: torch.Tensor) -> None:
    def work(layer: torch.Tensor) -> None:
        driver.launch(add, layer.data_ptr(), 1)
        if driver.captured is not None:
            driver.captured.append((COPY, *driver.captured[0][1:]))

    enqueue = for_layers(driver, work, layers)
    for layer in range(5):
        enqueue(layer)
    assert layers[:, 0].tolist() == [1] * 5


def test_after_an_error_the_layer_is_captured_again(driver: CpuDriver, layers: torch.Tensor) -> None:
    fails = False

    def work(layer: torch.Tensor) -> None:
        driver.launch(add, layer.data_ptr(), 1)
        if fails:
            raise ValueError("no such block")

    enqueue = for_layers(driver, work, layers)
    enqueue(0)
    fails = True
    with pytest.raises(ValueError, match="no such block"):
        enqueue(1)
    fails = False
    for layer in range(1, 5):
        enqueue(layer)
    assert layers[:, 0].tolist() == [1] * 5
    assert driver.captured is None
