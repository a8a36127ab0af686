"""Launches of captured graphs, with Python in the place of the CUDA driver: a graph is a list of kernels."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, addressof, c_int, c_uint64, c_void_p, cast
from typing import Any

import pytest
import torch

from neoserve._native import DriverCalls
from neoserve.device.launches import ForLayers, Launches

STREAM = 77
KERNEL, COPY = 0, 1
INVALID_VALUE = 1


class CpuDriver:
    """As much of the driver as `ForLayers` needs. A kernel adds to the integer that its first argument points to; what
    it adds is the second, four bytes long.

    captured: while a stream is captured, what was launched: the type of its node, and its arguments.
    """

    def __init__(self) -> None:
        self.captured: list[tuple[int, Any]] | None = None
        self.num_launched = 0
        self._graph: list[tuple[int, Any]] = []
        self._launch = CFUNCTYPE(c_int, c_uint64, c_uint64, c_uint64, c_uint64)(self._launched)

    def add(self, target: int, what: int) -> None:
        """A launch by Python."""
        arguments = (c_uint64 * 2)(target, what)
        pointers = (c_void_p * 2)(addressof(arguments), addressof(arguments) + 8)
        if self.captured is not None:
            self.captured.append((KERNEL, (arguments, pointers)))
        else:
            self._launched(0, 1, addressof(pointers), 0)

    def _launched(self, configuration: int, function: int, arguments: int, extra: int) -> int:
        pointers = cast(arguments, POINTER(c_void_p))
        target, what = (cast(pointers[index], POINTER(c_uint64))[0] for index in range(2))
        cast(target, POINTER(c_uint64))[0] += what & 0xFFFFFFFF
        self.num_launched += 1
        return 0

    def address(self, name: str) -> int:
        return cast(self._launch, c_void_p).value or 0

    def check(self, function: Any, code: int) -> None:
        assert code == 0

    def run(self, calls: DriverCalls, offset: int = 0) -> None:
        assert calls.run(offset) == 0

    def function(self, name: str, *types: Any) -> Callable[..., int]:
        return getattr(self, name, lambda *arguments: INVALID_VALUE)

    def cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        assert stream == STREAM
        assert self.captured is None
        self.captured = []
        return 0

    def cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        assert self.captured is not None
        self._graph, self.captured = self.captured, None
        graph._obj.value = 1
        return 0

    def cuGraphDestroy(self, graph: int) -> int:
        for _, (arguments, _) in self._graph:
            arguments[:] = [0, 0]  # they end with the graph
        return 0

    def cuGraphGetNodes(self, graph: int, nodes: Any, count: Any) -> int:
        if nodes is None:
            count._obj.value = len(self._graph)
        else:
            nodes[:] = range(1, 1 + len(self._graph))
        return 0

    def cuGraphGetEdges_v2(self, graph: int, before: Any, after: Any, kinds: Any, count: Any) -> int:
        if before is None:
            count._obj.value = max(0, len(self._graph) - 1)
        else:
            before[:], after[:] = range(1, len(self._graph)), range(2, 1 + len(self._graph))
        return 0

    def cuGraphNodeGetType(self, node: int, kind: Any) -> int:
        kind._obj.value = self._graph[node - 1][0]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: int, kernel: Any) -> int:
        kernel._obj.function = 1
        kernel._obj.arguments = addressof(self._graph[node - 1][1][1])
        return 0

    def cuFuncGetParamInfo(self, function: int, index: int, offset: Any, size: Any) -> int:
        if index > 1:
            return INVALID_VALUE
        offset._obj.value, size._obj.value = ((0, 8), (8, 4))[index]
        return 0


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
        driver.add(layer[2:].data_ptr(), 7)
        driver.add(other.data_ptr(), 1)
        driver.add(layer[3:].data_ptr(), 5)

    enqueue = for_layers(driver, work, layers)
    for layer in (3, 1, 0, 4, 1):
        enqueue(layer)
    assert layers.tolist() == [[0, 0, 7, 5], [0, 0, 14, 10], [0, 0, 0, 0], [0, 0, 7, 5], [0, 0, 7, 5]]
    assert other.item() == 5
    assert (num_called, driver.num_launched) == (2, 15)


def test_what_has_no_address_in_the_layer_is_enqueued_by_python(driver: CpuDriver, layers: torch.Tensor) -> None:
    other = torch.zeros(1, dtype=torch.int64)
    enqueue = for_layers(driver, lambda layer: driver.add(other.data_ptr(), 1), layers)
    for layer in range(5):
        enqueue(layer)
    assert other.item() == 5


def test_what_is_not_only_kernels_is_enqueued_by_python(driver: CpuDriver, layers: torch.Tensor) -> None:
    def work(layer: torch.Tensor) -> None:
        driver.add(layer.data_ptr(), 1)
        if driver.captured is not None:
            driver.captured.append((COPY, driver.captured[0][1]))

    enqueue = for_layers(driver, work, layers)
    for layer in range(5):
        enqueue(layer)
    assert layers[:, 0].tolist() == [1] * 5


def test_after_an_error_the_layer_is_captured_again(driver: CpuDriver, layers: torch.Tensor) -> None:
    fails = False

    def work(layer: torch.Tensor) -> None:
        driver.add(layer.data_ptr(), 1)
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
