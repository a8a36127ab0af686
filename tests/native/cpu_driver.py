"""Python in the place of the CUDA driver: a graph is a list of kernels, and a kernel is a function."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, addressof, c_int, c_uint64, c_void_p, cast, memmove
from typing import Any

from neoserve._native import DriverCalls
from neoserve.device.driver import Call

STREAM = 77
KERNEL, COPY = 0, 1
INVALID_VALUE = 1
_FUNCTION = CFUNCTYPE(c_int, c_uint64, c_uint64, c_uint64, c_uint64)

ARGUMENT_BYTES = 8
Kernel = Callable[..., None]
"""Of integers of so many bytes, but the last, which has four."""


class CpuDriver:
    """As much of the driver as recordings, copies and hand-offs need.

    captured: while a stream is captured, what was launched: the type of its node, the kernel and its arguments.
    log: what was enqueued, in order: kernels by their names, copies, events and values.
    """

    def __init__(self) -> None:
        self.captured: list[tuple[int, int, Any]] | None = None
        self.log: list[tuple[Any, ...]] = []
        self._graph: list[tuple[int, int, Any]] = []
        self._kernels: list[tuple[Kernel, int]] = []
        self._functions = {
            name: _FUNCTION(function)
            for name, function in {
                "cuLaunchKernelEx": self._launched,
                "copy": self._copied,
                "record": lambda event, stream, *_: self._logged("record", event, stream),
                "wait": lambda stream, event, *_: self._logged("wait", stream, event),
                "write": lambda stream, address, value, _: self._logged("write", stream, address, value & 0xFFFFFFFF),
                "await": lambda stream, address, value, _: self._logged("await", stream, address, value & 0xFFFFFFFF),
            }.items()
        }

    def launch(self, kernel: Kernel, *values: int) -> None:
        """A launch by Python."""
        arguments = (c_uint64 * len(values))(*values)
        pointers = (c_void_p * len(values))(*(addressof(arguments) + ARGUMENT_BYTES * i for i in range(len(values))))
        if (kernel, len(values)) not in self._kernels:
            self._kernels.append((kernel, len(values)))
        number = 1 + self._kernels.index((kernel, len(values)))
        if self.captured is not None:
            self.captured.append((KERNEL, number, (arguments, pointers)))
        else:
            self._launched(0, number, addressof(pointers), 0)

    def _launched(self, configuration: int, number: int, arguments: int, extra: int) -> int:
        kernel, num_values = self._kernels[number - 1]
        pointers = cast(arguments, POINTER(c_void_p))
        values = [cast(pointers[index], POINTER(c_uint64))[0] for index in range(num_values)]
        values[-1] &= 0xFFFFFFFF
        kernel(*values)
        return self._logged(kernel.__name__)

    def _copied(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        memmove(target, source, num_bytes)
        return self._logged("copy", num_bytes, stream)

    def _logged(self, *what: Any) -> int:
        self.log.append(what)
        return 0

    def _call(self, name: str, *arguments: int) -> Call:
        first, second, third, fourth = (*arguments, 0, 0)[:4]
        return (cast(self._functions[name], c_void_p).value or 0, first, second, third, fourth)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> Call:
        return self._call("copy", target, source, num_bytes, stream)

    def record_event(self, event: int, stream: int) -> Call:
        return self._call("record", event, stream)

    def wait_event(self, stream: int, event: int) -> Call:
        return self._call("wait", stream, event)

    def write_value(self, stream: int, address: int, value: int) -> Call:
        return self._call("write", stream, address, value)

    def wait_value(self, stream: int, address: int, value: int) -> Call:
        return self._call("await", stream, address, value)

    def address(self, name: str) -> int:
        return cast(self._functions.get(name, self._functions["copy"]), c_void_p).value or 0

    def check(self, function: Any, code: int) -> None:
        assert code == 0

    def run(self, calls: DriverCalls, *numbers: int) -> None:
        assert calls.run(numbers) == 0

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
        for *_, (arguments, _) in self._graph:
            arguments[:] = [0] * len(arguments)  # they end with the graph
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
        _, kernel._obj.function, (_, pointers) = self._graph[node - 1]
        kernel._obj.arguments = addressof(pointers)
        return 0

    def cuFuncGetParamInfo(self, function: int, index: int, offset: Any, size: Any) -> int:
        _, num_values = self._kernels[function - 1]
        if index >= num_values:
            return INVALID_VALUE
        offset._obj.value = ARGUMENT_BYTES * index
        size._obj.value = 4 if index == num_values - 1 else ARGUMENT_BYTES
        return 0
