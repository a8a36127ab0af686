import threading
import time

import pytest

from neoserve import _native
from tests.native.conftest import Flags


def test_a_flag_holds_what_it_was_raised_to(flags: Flags) -> None:
    assert _native.flag_read(flags.ready) == 0
    _native.flag_raise(flags.ready, 7)
    assert _native.flag_read(flags.ready) == 7
    assert _native.flag_read(flags.done) == 0


def test_wait_compares_and_does_not_ask_for_equality(flags: Flags) -> None:
    _native.flag_raise(flags.ready, 7)
    assert _native.flag_wait(flags.ready, 5, 0)
    assert _native.flag_wait(flags.ready, 7, 0)
    assert not _native.flag_wait(flags.ready, 8, 0.001)


def test_values_wrap(flags: Flags) -> None:
    _native.flag_raise(flags.ready, 2**32 - 1)
    assert not _native.flag_wait(flags.ready, 3, 0)
    _native.flag_raise(flags.ready, 3)
    assert _native.flag_wait(flags.ready, 2**32 - 1, 0)


def test_a_wait_ends_in_time(flags: Flags) -> None:
    start = time.monotonic()
    assert not _native.flag_wait(flags.ready, 1, 0.05)
    assert 0.05 <= time.monotonic() - start < 1


def test_a_wait_leaves_the_gil_to_the_thread_that_raises(flags: Flags) -> None:
    timer = threading.Timer(0.05, _native.flag_raise, (flags.ready, 1))
    timer.start()
    assert _native.flag_wait(flags.ready, 1, 30)
    timer.join()


@pytest.mark.parametrize("address", [0, 6])
def test_what_cannot_be_a_flag_is_refused(address: int) -> None:
    with pytest.raises(ValueError, match=f"address is {address}"):
        _native.flag_read(address)
