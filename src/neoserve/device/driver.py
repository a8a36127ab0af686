"""The few calls of the CUDA driver that torch does not offer, or that must cost the CPU next to nothing.

Streams, events and addresses are the driver's own: integers. ctypes releases the GIL while a call runs, so memory can
be registered by several threads.
"""

from __future__ import annotations

import ctypes
from ctypes import c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from neoserve._native import DriverCalls

_WAIT_UNTIL_GREATER_OR_EQUAL = 0x0
_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2


Call = tuple[int, int, int, int, int]
"""What enqueues something: a function's address and its arguments, filled up with zeros. `DriverCalls` makes it."""


class DriverError(RuntimeError):
    """A driver call failed; the message names the driver's error."""


class Driver:
    """libcuda, loaded once. Raises OSError where there is no NVIDIA driver."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        self._record_event = self.address("cuEventRecord")
        self._wait_event = self.address("cuStreamWaitEvent")
        self._copy = self.address("cuMemcpyAsync")
        self._write_value = self.address("cuStreamWriteValue32_v2")
        self._wait_value = self.address("cuStreamWaitValue32_v2")
        # With the types declared, ctypes takes plain integers: a call costs a microsecond.
        self._device_pointer = self.function("cuMemHostGetDevicePointer_v2", c_void_p, c_void_p, c_uint)
        self._register = self.function("cuMemHostRegister_v2", c_void_p, c_size_t, c_uint)
        self._unregister = self.function("cuMemHostUnregister", c_void_p)
        self._current_context = self.function("cuCtxGetCurrent", c_void_p)
        self._use_context = self.function("cuCtxSetCurrent", c_void_p)

    def run(self, calls: DriverCalls, *numbers: int) -> None:
        """`DriverCalls.run`; raises `DriverError`."""
        if code := calls.run(numbers):
            raise DriverError(f"the CUDA driver could not enqueue work: {self._text(code)}")

    def record_event(self, event: int, stream: int) -> Call:
        """The event is reached."""
        return (self._record_event, event, stream, 0, 0)

    def wait_event(self, stream: int, event: int) -> Call:
        """Later work waits for the event as it was last recorded."""
        return (self._wait_event, stream, event, 0, 0)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> Call:
        """A copy between device memory and pinned host memory, whichever way the addresses say."""
        return (self._copy, target, source, num_bytes, stream)

    def write_value(self, stream: int, address: int, value: int) -> Call:
        """Write `value` to the 32-bit word at device `address` once all earlier work is visible."""
        return (self._write_value, stream, address, value, 0)

    def wait_value(self, stream: int, address: int, value: int) -> Call:
        """Later work waits until the 32-bit word at device `address` is >= `value` (as a cyclic order)."""
        return (self._wait_value, stream, address, value, _WAIT_UNTIL_GREATER_OR_EQUAL)

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

    def address(self, name: str) -> int:
        """Where a function of the driver is; AttributeError where it is too old."""
        return ctypes.cast(getattr(self._lib, name), c_void_p).value or 0

    def check(self, function: Any, code: int) -> None:
        """Raise `DriverError` if that is what the function's result says."""
        if code != 0:
            raise DriverError(f"{function.__name__} failed: {self._text(code)}")

    def _text(self, code: int) -> str:
        message = ctypes.c_char_p()
        self._lib.cuGetErrorString(code, ctypes.byref(message))
        return f"{message.value.decode() if message.value else 'unknown error'} (error {code})"
