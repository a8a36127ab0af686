"""Kernel launches, with a function of Python in the driver's place."""

from __future__ import annotations

from ctypes import CFUNCTYPE, c_int, c_uint64, c_void_p, cast

from neoserve import _native

LAUNCHES = [(1, 2, 3, 0), (2**63, 5, 0, 6), (7, 8, 9, 0)]


def run(codes: list[int]) -> tuple[int, list[tuple[int, ...]]]:
    """What comes back when the launches return `codes`, and with what the function was called."""
    calls: list[tuple[int, ...]] = []

    @CFUNCTYPE(c_int, c_uint64, c_uint64, c_uint64, c_uint64)
    def enqueue(*addresses: int) -> int:
        calls.append(addresses)
        return codes[len(calls) - 1]

    address = cast(enqueue, c_void_p).value
    assert address is not None
    return _native.KernelLaunches(address, LAUNCHES).run(), calls


def test_all_are_enqueued_in_order() -> None:
    assert run([0, 0, 0]) == (0, LAUNCHES)


def test_nothing_is_enqueued_after_an_error() -> None:
    assert run([0, 700, 0]) == (700, LAUNCHES[:2])
