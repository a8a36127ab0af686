"""A captured CUDA graph, replayed launch by launch, as it was or with some of its addresses moved.

An instantiated graph takes 128 KiB of the GPU's memory, whatever is in it; a captured one lies in the host's. So
recordings that are many, and of work that takes the GPU longer than enqueueing it, are not instantiated: their nodes
are enqueued one by one, by the driver and with the arguments that were captured.

The structures are those of cuda.h.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    addressof,
    byref,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint,
    c_uint64,
    c_void_p,
    cast,
    memmove,
)
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from neoserve._native import DriverCalls
from neoserve.device.driver import Call, Driver

_KERNEL, _COPY, _FILL, _EMPTY = 0, 1, 2, 5
"""Types of nodes."""
_PROGRAMMATIC = 1
"""The type of an edge by which a kernel may begin before its predecessor ends."""
_BEGINS_EARLY = 6
"""The same as an attribute of a launch."""
_KEPT_ATTRIBUTES = (2, 4, 5, 11, 14)
"""Of a launch: cooperative, cluster dimension and its scheduling, preferred cluster dimension, preferred carveout."""
_RELAXED = 2
"""The mode of a capture in which anything may be called."""
_WORD_BYTES = 8


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector: what it collects may enqueue, or end a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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


class Kernels(NamedTuple):
    """Launches of kernels, with arguments of their own.

    words: where among the arguments an address in the memory asked for lies. kept: lives as long as the calls are used.
    """

    calls: list[Call]
    words: list[int]
    kept: list[object]


class Launches:
    """The launches of captured graphs. Raises AttributeError where the driver is older than CUDA 12.4."""

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
        parameter = (c_void_p, c_size_t, c_void_p, c_void_p)
        self._function_parameter = function("cuFuncGetParamInfo", *parameter)
        self._kernel_parameter = function("cuKernelGetParamInfo", *parameter)
        self._begin_capture = function("cuStreamBeginCapture_v2", c_void_p, c_int)
        self._end_capture = function("cuStreamEndCapture", c_void_p, c_void_p)
        self._destroy = function("cuGraphDestroy", c_void_p)
        self._known_places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._enqueue_kernel = driver.address("cuLaunchKernelEx")
        self._enqueue_fill = {size: driver.address(f"cuMemsetD{8 * size}Async") for size in (1, 2, 4)}

    def of(self, graph: torch.cuda.CUDAGraph, stream: int) -> Callable[[], None]:
        """What enqueues everything in a graph that was captured with `keep_graph`, on that stream.

        Raises ValueError for what is neither a kernel nor a copy or a fill of one piece of memory.
        """
        kept: list[object] = [graph]  # it owns the arguments
        calls = []
        for node, begins_early in self._in_order(graph.raw_cuda_graph()):
            kind = self._type_of(node)
            if kind == _KERNEL:
                launch, kernel = self._kernel_launch(node, stream, begins_early=begins_early)
                kept.append(launch)
                calls.append(self._kernel_call(launch, kernel))
            elif kind == _COPY:
                calls.append(self._copy_call(node, stream))
            elif kind == _FILL:
                calls.append(self._fill_call(node, stream))
            elif kind != _EMPTY:
                raise ValueError(f"a node of type {kind}; expected a kernel, a copy or a fill")
        return partial(self._run, kept, DriverCalls(calls))

    def moving(self, work: Callable[[], None], memory: range, stream: int) -> Callable[[int], None] | None:
        """What enqueues the kernels of `work` with all addresses in `memory` so many bytes further; `None` if it has
        none there, or enqueues anything else. Nothing is enqueued by this."""
        kernels = self.kernels(work, memory, stream)
        if kernels is None or not kernels.words:
            return None
        return partial(self._run, kernels.kept, DriverCalls(kernels.calls, [(word, 0) for word in kernels.words]))

    def kernels(self, work: Callable[[], None], memory: range, stream: int) -> Kernels | None:
        """The kernels of `work`, which are not enqueued by this; `None` if it enqueues anything else."""
        kernels = Kernels([], [], [])
        graph = self._captured(work, stream)
        try:
            for node, begins_early in self._in_order(graph):
                if self._type_of(node) != _KERNEL:
                    return None
                launch, kernel = self._kernel_launch(node, stream, begins_early=begins_early)
                if kernel.extra:  # its arguments are in one piece
                    return None
                arguments, pointers = self._copied_arguments(kernel)
                kernel.arguments = addressof(pointers)
                kernels.calls.append(self._kernel_call(launch, kernel))
                kernels.kept.extend((launch, arguments, pointers))
                found = np.frombuffer(arguments, dtype=np.uint64)
                inside = np.flatnonzero((found >= memory.start) & (found < memory.stop))
                kernels.words.extend(addressof(arguments) + _WORD_BYTES * int(index) for index in inside)
        finally:
            self._call(self._destroy, graph)
        return kernels

    def _captured(self, work: Callable[[], None], stream: int) -> int:
        """The graph of what `work` enqueues. Torch's way to capture takes far longer, and sets memory aside."""
        graph = c_void_p()
        with no_collection():
            self._call(self._begin_capture, stream, _RELAXED)
            try:
                work()
            finally:
                self._call(self._end_capture, stream, byref(graph))
        return graph.value or 0

    def _copied_arguments(self, kernel: _Kernel) -> tuple[Any, Any]:
        """A kernel's arguments as they lie in its parameter space, and the address of each."""
        places = self._places(kernel)
        total_bytes = sum(places[-1]) if places else 0
        arguments = (c_uint64 * -(-total_bytes // _WORD_BYTES))()
        pointers = (c_void_p * len(places))(*(addressof(arguments) + place for place, _ in places))
        sources = cast(kernel.arguments, POINTER(c_void_p))
        for index, (place, num_bytes) in enumerate(places):
            memmove(addressof(arguments) + place, sources[index] or 0, num_bytes)
        return arguments, pointers

    def _places(self, kernel: _Kernel) -> list[tuple[int, int]]:
        """Offset and size of each parameter of a kernel."""
        known = self._known_places.setdefault((kernel.function, kernel.kernel), [])
        if not known:
            info = self._function_parameter if kernel.function else self._kernel_parameter
            offset, size = c_size_t(), c_size_t()
            while info(kernel.function or kernel.kernel, len(known), byref(offset), byref(size)) == 0:
                known.append((offset.value, size.value))
        return known

    def _type_of(self, node: int) -> int:
        kind = c_int()
        self._call(self._type, node, byref(kind))
        return kind.value

    def _in_order(self, graph: int) -> list[tuple[int, bool]]:
        """The nodes, each after those that it depends on, and whether it may begin before those end."""
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

    def _kernel_launch(self, node: int, stream: int, *, begins_early: bool) -> tuple[_Launch, _Kernel]:
        """A launch's configuration, and what is launched."""
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
        return launch, kernel

    def _kernel_call(self, launch: _Launch, kernel: _Kernel) -> Call:
        function = kernel.function or kernel.kernel or 0
        return (self._enqueue_kernel, addressof(launch), function, kernel.arguments or 0, kernel.extra or 0)

    def _run(self, _: list[object], calls: DriverCalls, *numbers: int) -> None:
        """The calls, which need what else is given."""
        self._driver.run(calls, *numbers)

    def _copy_call(self, node: int, stream: int) -> Call:
        copy = _Copy()
        self._call(self._copy, node, byref(copy))
        source, target = (end.device + end.x_bytes if end.device else 0 for end in (copy.source, copy.target))
        if not (source and target and copy.height == copy.depth == 1):
            raise ValueError(f"a copy of {copy.depth} x {copy.height} pieces; expected one, of mapped memory")
        return self._driver.copy(target, source, copy.width_bytes, stream)

    def _fill_call(self, node: int, stream: int) -> Call:
        fill = _Fill()
        self._call(self._fill, node, byref(fill))
        if fill.height != 1:
            raise ValueError(f"a fill of {fill.height} pieces; expected one")
        return (self._enqueue_fill[fill.element_bytes], fill.target, fill.value, fill.width, stream)

    def _count(self, function: Any, graph: int, *nothing: None) -> int:
        count = c_size_t()
        self._call(function, graph, *nothing, byref(count))
        return count.value

    def _call(self, function: Any, *arguments: Any) -> None:
        self._driver.check(function, function(*arguments))


class ForLayers:
    """As `Device.for_layers`, for work on that stream, which is current.

    Python enqueues the first layer that is asked for, so that the kernels are loaded and whatever else is made once is
    made. The second one is captured; it and those after it are that capture with the addresses in the layer moved. What
    cannot be moved is enqueued by Python.
    """

    def __init__(
        self, launches: Launches, work: Callable[[torch.Tensor], None], layers: torch.Tensor, stream: int
    ) -> None:
        self._launches = launches
        self._work = work
        self._layers = layers
        self._layer_bytes = layers.stride(0) * layers.element_size()
        self._stream = stream
        self._num_enqueued = 0
        self._move: Callable[[int], None] | None = None
        self._captured = 0

    def __call__(self, layer: int) -> None:
        if self._num_enqueued == 1:
            memory, self._captured = self._layers[layer], layer
            places = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
            self._move = self._launches.moving(partial(self._work, memory), places, self._stream)
        if self._move is not None:
            self._move((layer - self._captured) * self._layer_bytes)
        else:
            self._work(self._layers[layer])
        self._num_enqueued += 1
