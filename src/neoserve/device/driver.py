"""The few calls of the CUDA driver that torch does not offer: stream memory operations and registered host memory.

ctypes releases the GIL while a call runs, so memory can be registered by several threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

_WAIT_UNTIL_GREATER_OR_EQUAL = 0x0
_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2


class DriverError(RuntimeError):
    """A driver call failed; the message names the call and the driver's error."""


class Driver:
    """libcuda, loaded once. Raises OSError where there is no NVIDIA driver."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: write `value` to the 32-bit word at device `address` once all earlier work is visible."""
        self._call(
            "cuStreamWriteValue32_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(address),
            ctypes.c_uint32(value),
            ctypes.c_uint(0),
        )

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue: later work waits until the 32-bit word at device `address` is >= `value` (as a cyclic order)."""
        self._call(
            "cuStreamWaitValue32_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(address),
            ctypes.c_uint32(value),
            ctypes.c_uint(_WAIT_UNTIL_GREATER_OR_EQUAL),
        )

    def device_address(self, host_address: int) -> int:
        """Where the device sees pinned or registered host memory."""
        device = ctypes.c_uint64()
        self._call(
            "cuMemHostGetDevicePointer_v2", ctypes.byref(device), ctypes.c_void_p(host_address), ctypes.c_uint(0)
        )
        return device.value

    def register(self, address: int, num_bytes: int) -> None:
        """Pin existing host memory and map it for the device."""
        self._call(
            "cuMemHostRegister_v2",
            ctypes.c_void_p(address),
            ctypes.c_size_t(num_bytes),
            ctypes.c_uint(_REGISTER_PORTABLE_AND_MAPPED),
        )

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that begins at `address`."""
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def current_context(self) -> int:
        """The calling thread's context."""
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        return context.value or 0

    def use_context(self, context: int) -> None:
        """Make a context the calling thread's."""
        self._call("cuCtxSetCurrent", ctypes.c_void_p(context))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code != 0:
            message = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(message))
            text = message.value.decode() if message.value else "unknown error"
            raise DriverError(f"{name} failed: {text} (error {code})")
