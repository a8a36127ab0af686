"""The few calls of the CUDA driver that torch does not offer, or that must cost the CPU next to nothing.

Streams, events and addresses are the driver's own: integers. ctypes releases the GIL while a call runs, so memory can
be registered by several threads.
"""

from __future__ import annotations

import ctypes
from ctypes import c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

_WAIT_UNTIL_GREATER_OR_EQUAL = 0x0
_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2


class DriverError(RuntimeError):
    """A driver call failed; the message names the call and the driver's error."""


class Driver:
    """libcuda, loaded once. Raises OSError where there is no NVIDIA driver."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        # With the types declared, ctypes takes plain integers: a call costs a microsecond.
        self._record_event = self.function("cuEventRecord", c_void_p, c_void_p)
        self._wait_event = self.function("cuStreamWaitEvent", c_void_p, c_void_p, c_uint)
        self._copy = self.function("cuMemcpyAsync", c_uint64, c_uint64, c_size_t, c_void_p)
        self._write_value = self.function("cuStreamWriteValue32_v2", c_void_p, c_uint64, c_uint32, c_uint)
        self._wait_value = self.function("cuStreamWaitValue32_v2", c_void_p, c_uint64, c_uint32, c_uint)
        self._device_pointer = self.function("cuMemHostGetDevicePointer_v2", c_void_p, c_void_p, c_uint)
        self._register = self.function("cuMemHostRegister_v2", c_void_p, c_size_t, c_uint)
        self._unregister = self.function("cuMemHostUnregister", c_void_p)
        self._current_context = self.function("cuCtxGetCurrent", c_void_p)
        self._use_context = self.function("cuCtxSetCurrent", c_void_p)

    def record_event(self, event: int, stream: int) -> None:
        """Enqueue: the event is reached."""
        self.check(self._record_event, self._record_event(event, stream))

    def wait_event(self, stream: int, event: int) -> None:
        """Enqueue: later work waits for the event as it was last recorded."""
        self.check(self._wait_event, self._wait_event(stream, event, 0))

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Enqueue a copy between device memory and pinned host memory, whichever way the addresses say."""
        self.check(self._copy, self._copy(target, source, num_bytes, stream))

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: write `value` to the 32-bit word at device `address` once all earlier work is visible."""
        self.check(self._write_value, self._write_value(stream, address, value, 0))

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: later work waits until the 32-bit word at device `address` is >= `value` (as a cyclic order)."""
        self.check(self._wait_value, self._wait_value(stream, address, value, _WAIT_UNTIL_GREATER_OR_EQUAL))

    def device_address(self, host_address: int) -> int:
        """Where the device sees pinned or registered host memory."""
        device = c_uint64()
        self.check(self._device_pointer, self._device_pointer(ctypes.addressof(device), host_address, 0))
        return device.value

    def register(self, address: int, num_bytes: int) -> None:
        """Pin existing host memory and map it for the device."""
        self.check(self._register, self._register(address, num_bytes, _REGISTER_PORTABLE_AND_MAPPED))

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that begins at `address`."""
        self.check(self._unregister, self._unregister(address))

    def current_context(self) -> int:
        """The calling thread's context."""
        context = c_void_p()
        self.check(self._current_context, self._current_context(ctypes.addressof(context)))
        return context.value or 0

    def use_context(self, context: int) -> None:
        """Make a context the calling thread's."""
        self.check(self._use_context, self._use_context(context))

    def function(self, name: str, *types: Any) -> Any:
        """A function of the driver that takes arguments of these types; AttributeError where it is too old."""
        function = getattr(self._lib, name)
        function.argtypes = types
        return function

    def check(self, function: Any, code: int) -> None:
        """Raise `DriverError` if that is what the function's result says."""
        if code != 0:
            message = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(message))
            text = message.value.decode() if message.value else "unknown error"
            raise DriverError(f"{function.__name__} failed: {text} (error {code})")
