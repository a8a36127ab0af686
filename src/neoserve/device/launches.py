"""A captured CUDA graph, replayed launch by launch.

An instantiated graph takes 128 KiB of the GPU's memory, whatever is in it; a captured one lies in the host's. So
recordings that are many, and of work that takes the GPU longer than enqueueing it, are not instantiated: their nodes
are enqueued one by one, by the driver and with the arguments that were captured.

The structures are those of cuda.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, addressof, byref, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p, cast
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from neoserve._native import KernelLaunches
from neoserve.device.driver import Driver

_KERNEL, _COPY, _FILL, _EMPTY = 0, 1, 2, 5
"""Types of nodes."""
_PROGRAMMATIC = 1
"""The type of an edge by which a kernel may begin before its predecessor ends."""
_BEGINS_EARLY = 6
"""The same as an attribute of a launch."""
_KEPT_ATTRIBUTES = (2, 4, 5, 11, 14)
"""Of a launch: cooperative, cluster dimension and its scheduling, preferred cluster dimension, preferred carveout."""


class _Kernel(Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", c_void_p), ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint),
        ("arguments", c_void_p), ("extra", c_void_p), ("kernel", c_void_p), ("context", c_void_p),
    )  # fmt: skip


class _End(Structure):
    """One end of a copy, in CUDA_MEMCPY3D."""

    _fields_ = (
        ("x_bytes", c_size_t), ("y", c_size_t), ("z", c_size_t), ("lod", c_size_t), ("memory_type", c_int),
        ("host", c_void_p), ("device", c_uint64), ("array", c_void_p), ("reserved", c_void_p), ("pitch", c_size_t),
        ("height", c_size_t),
    )  # fmt: skip


class _Copy(Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = (
        ("source", _End), ("target", _End), ("width_bytes", c_size_t), ("height", c_size_t), ("depth", c_size_t),
    )  # fmt: skip


class _Fill(Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = (
        ("target", c_uint64), ("pitch", c_size_t), ("value", c_uint), ("element_bytes", c_uint), ("width", c_size_t),
        ("height", c_size_t),
    )  # fmt: skip


class _Edge(Structure):
    """CUgraphEdgeData."""

    _fields_ = (("from_port", c_ubyte), ("to_port", c_ubyte), ("type", c_ubyte), ("reserved", c_ubyte * 5))


class _Attribute(Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("padding", c_ubyte * 4), ("value", c_ubyte * 64))


class _Launch(Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint), ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)), ("num_attributes", c_uint),
    )  # fmt: skip


class Launches:
    """The launches of captured graphs. Raises AttributeError where the driver is older than CUDA 12.3."""

    @classmethod
    def by(cls, driver: Driver) -> Launches | None:
        """Of this driver, if it is new enough."""
        try:
            return cls(driver)
        except AttributeError:
            return None

    def __init__(self, driver: Driver) -> None:
        function = driver.function
        self._driver = driver
        self._nodes = function("cuGraphGetNodes", c_void_p, c_void_p, c_void_p)
        self._edges = function("cuGraphGetEdges_v2", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)
        self._type = function("cuGraphNodeGetType", c_void_p, c_void_p)
        self._kernel = function("cuGraphKernelNodeGetParams_v2", c_void_p, c_void_p)
        self._attribute = function("cuGraphKernelNodeGetAttribute", c_void_p, c_int, c_void_p)
        self._copy = function("cuGraphMemcpyNodeGetParams", c_void_p, c_void_p)
        self._fill = function("cuGraphMemsetNodeGetParams", c_void_p, c_void_p)
        self._enqueue_kernel = function("cuLaunchKernelEx", c_void_p, c_void_p, c_void_p, c_void_p)
        self._enqueue_fill = {
            size: function(f"cuMemsetD{8 * size}Async", c_uint64, c_uint, c_size_t, c_void_p) for size in (1, 2, 4)
        }

    def of(self, graph: torch.cuda.CUDAGraph, stream: int) -> Callable[[], None]:
        """What enqueues everything in a graph that was captured with `keep_graph`, on that stream.

        Raises ValueError for what is neither a kernel nor a copy or a fill of one piece of memory.
        """
        kept: list[object] = [graph]  # it owns the arguments
        calls: list[Callable[[], None]] = []
        nodes = [(self._type_of(node), node, begins_early) for node, begins_early in self._in_order(graph)]
        for kind, group in groupby(nodes, key=itemgetter(0)):
            if kind == _KERNEL:
                kernels = [self._kernel_launch(node, stream, begins_early=early) for _, node, early in group]
                kept += [launch for launch, _ in kernels]
                calls.append(self._kernels_call(kernels))
            elif kind == _COPY:
                calls += [self._copy_call(node, stream) for _, node, _ in group]
            elif kind == _FILL:
                calls += [self._fill_call(node, stream) for _, node, _ in group]
            elif kind != _EMPTY:
                raise ValueError(f"a node of type {kind}; expected a kernel, a copy or a fill")
        return partial(_replay, kept, tuple(calls))

    def _type_of(self, node: int) -> int:
        kind = c_int()
        self._call(self._type, node, byref(kind))
        return kind.value

    def _in_order(self, captured: torch.cuda.CUDAGraph) -> list[tuple[int, bool]]:
        """The nodes, each after those that it depends on, and whether it may begin before those end."""
        graph = captured.raw_cuda_graph()
        nodes = (c_uint64 * self._count(self._nodes, graph, None))()
        self._call(self._nodes, graph, nodes, byref(c_size_t(len(nodes))))
        num_edges = self._count(self._edges, graph, None, None, None)
        before, after, kinds = (c_uint64 * num_edges)(), (c_uint64 * num_edges)(), (_Edge * num_edges)()
        if num_edges:
            self._call(self._edges, graph, before, after, kinds, byref(c_size_t(num_edges)))
        early = {node for node, edge in zip(after, kinds, strict=True) if edge.type == _PROGRAMMATIC}
        waits_for: dict[int, set[int]] = {node: set() for node in nodes}
        for first, second in zip(before, after, strict=True):
            waits_for[second].add(first)
        ordered: dict[int, bool] = {}
        while len(ordered) < len(waits_for):
            ordered |= {node: node in early for node in waits_for if waits_for[node] <= ordered.keys()}
        return list(ordered.items())

    def _kernel_launch(self, node: int, stream: int, *, begins_early: bool) -> tuple[_Launch, tuple[int, int, int]]:
        """A launch's configuration, and the addresses of its function, of its arguments and of what is extra."""
        kernel = _Kernel()
        self._call(self._kernel, node, byref(kernel))
        attributes = []
        for number in _KEPT_ATTRIBUTES:
            attribute = _Attribute(id=number)
            is_known = self._attribute(node, number, byref(attribute, _Attribute.value.offset)) == 0
            if is_known and any(attribute.value):
                attributes.append(attribute)
        if begins_early:
            attributes.append(_Attribute(id=_BEGINS_EARLY, value=(c_ubyte * 64)(1)))
        launch = _Launch(
            kernel.grid, kernel.block, kernel.shared_bytes, stream, (_Attribute * len(attributes))(*attributes),
            len(attributes),
        )  # fmt: skip
        return launch, (kernel.function or kernel.kernel or 0, kernel.arguments or 0, kernel.extra or 0)

    def _kernels_call(self, kernels: Sequence[tuple[_Launch, tuple[int, int, int]]]) -> Callable[[], None]:
        """All of them in one call, without Python in between."""
        enqueue = cast(self._enqueue_kernel, c_void_p).value
        assert enqueue is not None
        launches = KernelLaunches(enqueue, [(addressof(launch), *others) for launch, others in kernels])

        def call() -> None:
            if code := launches.run():
                self._driver.check(self._enqueue_kernel, code)

        return call

    def _copy_call(self, node: int, stream: int) -> Callable[[], None]:
        copy = _Copy()
        self._call(self._copy, node, byref(copy))
        source, target = (end.device + end.x_bytes if end.device else 0 for end in (copy.source, copy.target))
        if not (source and target and copy.height == copy.depth == 1):
            raise ValueError(f"a copy of {copy.depth} x {copy.height} pieces; expected one, of mapped memory")
        return partial(self._driver.copy, target, source, copy.width_bytes, stream)

    def _fill_call(self, node: int, stream: int) -> Callable[[], None]:
        fill = _Fill()
        self._call(self._fill, node, byref(fill))
        if fill.height != 1:
            raise ValueError(f"a fill of {fill.height} pieces; expected one")
        return partial(self._call, self._enqueue_fill[fill.element_bytes], fill.target, fill.value, fill.width, stream)

    def _count(self, function: Any, graph: int, *nothing: None) -> int:
        count = c_size_t()
        self._call(function, graph, *nothing, byref(count))
        return count.value

    def _call(self, function: Any, *arguments: Any) -> None:
        self._driver.check(function, function(*arguments))


def _replay(_: list[object], calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
