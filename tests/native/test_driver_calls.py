"""Calls of the driver, with a function of Python in its place."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, addressof, c_int, c_uint64, c_void_p, cast

import pytest

from neoserve import _native

ARGUMENTS = [(1, 2, 3, 0), (2**63, 5, 0, 6), (7, 8, 9, 0)]


def address_of(enqueue: object) -> int:
    address = cast(enqueue, c_void_p).value
    assert address is not None
    return address


def driver(enqueue: Callable[..., int]) -> object:
    """A function that takes the place of the driver's."""
    return CFUNCTYPE(c_int, c_uint64, c_uint64, c_uint64, c_uint64)(enqueue)


def run(codes: list[int]) -> tuple[int, list[tuple[int, ...]]]:
    """What comes back when the calls return `codes`, and with what the function was called."""
    calls: list[tuple[int, ...]] = []

    def enqueue(*addresses: int) -> int:
        calls.append(addresses)
        return codes[len(calls) - 1]

    function = driver(enqueue)
    address = address_of(function)
    return _native.DriverCalls([(address, *arguments) for arguments in ARGUMENTS]).run(), calls


def test_all_are_made_in_order() -> None:
    assert run([0, 0, 0]) == (0, ARGUMENTS)


def test_none_is_made_after_an_error() -> None:
    assert run([0, 700, 0]) == (700, ARGUMENTS[:2])


def test_moving_words_are_so_far_from_where_they_began_and_others_stay() -> None:
    arguments = (c_uint64 * 3)(1000, 2**40, 2**64 - 1)
    seen: list[list[int]] = []

    def enqueue(configuration: int, function: int, address: int, extra: int) -> int:
        seen.append(list(cast(address, POINTER(c_uint64))[:3]))
        return 0

    function = driver(enqueue)
    words = [addressof(arguments) + 8 * index for index in (1, 2)]
    calls = _native.DriverCalls([(address_of(function), 1, 2, addressof(arguments), 0)], [(word, 0) for word in words])
    for offset in (0, 64, -64, 2**33):
        assert calls.run([offset]) == 0
    assert seen == [
        [1000, 2**40, 2**64 - 1],
        [1000, 2**40 + 64, 63],
        [1000, 2**40 - 64, 2**64 - 65],
        [1000, 2**40 + 2**33, 2**33 - 1],
    ]


def test_words_and_arguments_move_by_numbers_of_their_own() -> None:
    word = c_uint64(50)
    seen: list[tuple[int, ...]] = []

    def enqueue(*arguments: int) -> int:
        seen.append((*arguments, word.value))
        return 0

    function = driver(enqueue)
    made = [(address_of(function), 1, 2, 3, 4), (address_of(function), 5, 6, 7, 2**47)]
    calls = _native.DriverCalls(made, words=[(addressof(word), 1)], arguments=[(0, 2, 0), (1, 0, 0), (1, 3, 2)])
    for numbers in ((0, 0, 0), (100, 7, -1), (-1, 1, 2**40), (0, 0, 0)):
        assert calls.run(numbers) == 0
    assert seen == [
        (1, 2, 3, 4, 50), (5, 6, 7, 2**47, 50),
        (1, 2, 103, 4, 57), (105, 6, 7, 2**47 - 1, 57),
        (1, 2, 2, 4, 51), (4, 6, 7, 2**47 + 2**40, 51),
        (1, 2, 3, 4, 50), (5, 6, 7, 2**47, 50),
    ]  # fmt: skip


def test_what_is_not_there_cannot_move() -> None:
    function = driver(lambda *_: 0)
    made = [(address_of(function), 1, 2, 3, 4)]
    for argument in ((1, 0, 0), (0, 4, 0)):
        with pytest.raises(IndexError):
            _native.DriverCalls(made, arguments=[argument])
    calls = _native.DriverCalls(made, arguments=[(0, 0, 1)])
    with pytest.raises(ValueError, match="got 1 numbers to move by; expected at least 2"):
        calls.run([8])
