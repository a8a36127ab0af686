"""The worker pool between its flags: order, faults, shutdown, and the CPU time that waiting takes."""

import gc
import re
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from neoserve import _native
from tests.native.conftest import Flags
from tests.native.float64 import Geometry, HostRows

FAULTS = {"throw": "failed at layer 1 .*injected fault", "die": "died at layer 1", "stall": r"layer 1 .*0\.2 s"}


@pytest.fixture
def hasty_pool() -> Iterator[_native.WorkerPool]:
    """A pool with a deadline that a test can wait for."""
    pool = _native.WorkerPool(_native.allowed_cpus()[:2], spin_us=20, deadline_s=0.2)
    yield pool
    pool.close()


def arm_all(rows: HostRows, lap: _native.Lap, flags: Flags, *, first: int = 1) -> int:
    """Arm a lap's layers: layer l has value first + l of both flags. Returns the last value."""
    num_layers = rows.geometry.num_layers
    for layer in range(num_layers):
        value = first + layer
        rows.attention.arm(lap, layer, ready=flags.ready, ready_value=value, done=flags.done, done_value=value)
    return first + num_layers - 1


def test_layers_run_one_by_one_behind_their_flags(pool: _native.WorkerPool, flags: Flags) -> None:
    rows = HostRows(pool, Geometry(num_layers=4), [3, 50, 129])
    lap = rows.plan()
    arm_all(rows, lap, flags)
    for layer in range(4):
        assert not _native.flag_wait(flags.done, layer + 1, 0.002)
        assert lap.layers_done == layer
        _native.flag_raise(flags.ready, layer + 1)
        assert _native.flag_wait(flags.done, layer + 1, 30)
        rows.check(layer)
    timeline = lap.timeline()
    assert timeline[:, 0].tolist() == [0, 1, 2, 3]
    assert (timeline[:, 1] < timeline[:, 2]).all()
    assert (timeline[1:, 1] >= timeline[:-1, 2]).all()
    assert lap.busy_us == pytest.approx((timeline[:, 2] - timeline[:, 1]).sum() / 1e3)


def test_two_laps_alternate(pool: _native.WorkerPool, flags: Flags) -> None:
    other = Flags()
    sides = [
        (HostRows(pool, Geometry(num_layers=6), [40, 7]), flags),
        (HostRows(pool, Geometry(num_layers=6), [99]), other),
    ]
    laps = [rows.plan() for rows, _ in sides]
    for layer in range(6):
        for (rows, side), lap in zip(sides, laps, strict=True):
            rows.attention.arm(
                lap, layer, ready=side.ready, ready_value=layer + 1, done=side.done, done_value=layer + 1
            )
    _native.flag_raise(other.ready, 6)  # early: the first lap's layers still go first
    assert not _native.flag_wait(other.done, 1, 0.002)
    for layer in range(6):
        _native.flag_raise(flags.ready, layer + 1)
        assert _native.flag_wait(other.done, layer + 1, 30)
        for rows, _ in sides:
            rows.check(layer)
    starts = [lap.timeline()[:, 1] for lap in laps]
    assert (starts[0] < starts[1]).all()
    assert (starts[1][:-1] < starts[0][1:]).all()


def test_armed_layers_keep_their_lap(pool: _native.WorkerPool, flags: Flags) -> None:
    rows = HostRows(pool, Geometry(), [60])
    last = arm_all(rows, rows.plan(), flags)
    gc.collect()
    _native.flag_raise(flags.ready, last)
    assert _native.flag_wait(flags.done, last, 30)
    rows.check(1)


@pytest.mark.parametrize("worker", [0, -1])
@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_fault_fails_what_is_armed_and_the_pool_lives_on(
    hasty_pool: _native.WorkerPool, flags: Flags, kind: str, worker: int
) -> None:
    rows = HostRows(hasty_pool, Geometry(num_layers=5), [30, 70])
    lap = rows.plan()
    hasty_pool.inject_fault(kind, after_tasks=1, worker=worker)
    last = arm_all(rows, lap, flags)
    start = time.monotonic()
    _native.flag_raise(flags.ready, 2)  # layers 2, 3, 4 never become ready
    assert _native.flag_wait(flags.done, last, 30)
    assert time.monotonic() - start < 2
    assert lap.layers_done == 1

    error = hasty_pool.error()
    assert error is not None
    assert re.search(FAULTS[kind], error)
    with pytest.raises(RuntimeError, match=re.escape(error)):
        rows.attention.attend(lap, 0)
    last = arm_all(rows, lap, flags, first=last + 1)
    assert _native.flag_read(flags.done) == last  # at once, without work
    assert hasty_pool.error() == error
    assert lap.layers_done == 1

    hasty_pool.clear_error()
    assert hasty_pool.error() is None
    rows.attention.attend(lap, 3)
    rows.check(3)


def test_a_deadline_names_who_is_late(hasty_pool: _native.WorkerPool) -> None:
    rows = HostRows(hasty_pool, Geometry(), [5])
    hasty_pool.inject_fault("stall", worker=0)
    with pytest.raises(RuntimeError, match=r"layer 0 of a lap of 1 rows was not done within 0\.2 s.*worker 0"):
        rows.attention.attend(rows.plan(), 0)


def test_no_deadline_runs_while_a_layer_is_not_ready(hasty_pool: _native.WorkerPool, flags: Flags) -> None:
    rows = HostRows(hasty_pool, Geometry(), [5])
    last = arm_all(rows, rows.plan(), flags)
    time.sleep(0.5)
    assert hasty_pool.error() is None
    _native.flag_raise(flags.ready, last)
    assert _native.flag_wait(flags.done, last, 30)


def test_close_ends_an_awaited_lap(flags: Flags) -> None:
    pool = _native.WorkerPool(_native.allowed_cpus()[:2])
    rows = HostRows(pool, Geometry(), [5])
    lap = rows.plan()
    last = arm_all(rows, lap, flags)
    threading.Timer(0.05, pool.close).start()
    assert _native.flag_wait(flags.done, last, 30)
    pool.close()
    assert pool.error() == "the worker pool was closed with 2 tasks armed"
    with pytest.raises(RuntimeError, match="closed"):
        rows.attention.arm(lap, 0, ready=flags.ready, ready_value=9, done=flags.done, done_value=9)
    assert _native.flag_read(flags.done) == 9
    with pytest.raises(RuntimeError, match="closed"):
        pool.clear_error()


def test_clear_error_empties_the_queue_of_a_pool_without_error(pool: _native.WorkerPool, flags: Flags) -> None:
    rows = HostRows(pool, Geometry(), [5])
    lap = rows.plan()
    last = arm_all(rows, lap, flags)
    pool.clear_error()
    assert _native.flag_read(flags.done) == last
    assert pool.error() is None
    rows.attention.attend(lap, 0)
    assert lap.timeline()[:, 0].tolist() == [0]


def test_callers_wait_without_the_gil(hasty_pool: _native.WorkerPool) -> None:
    """While `attend` is held up by a stalled worker, another thread of Python counts on."""
    rows = HostRows(hasty_pool, Geometry(), [5])
    hasty_pool.inject_fault("stall")
    counts = [0]
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(RuntimeError, match="not done within"):
        rows.attention.attend(rows.plan(), 0)
    done.set()
    thread.join()
    assert counts[0] > 10


def test_an_idle_pool_sleeps(pool: _native.WorkerPool) -> None:
    rows = HostRows(pool, Geometry(), [5])
    rows.attention.attend(rows.plan(), 0)
    time.sleep(0.05)
    cpu_s, start = time.process_time(), time.monotonic()
    time.sleep(1)
    assert time.process_time() - cpu_s < 0.01 * (time.monotonic() - start)


def test_read_bandwidth_is_a_limit_and_not_a_slow_loop() -> None:
    """It is what attention is held against, so one worker reads no slower than numpy sums, noise allowed for."""
    words = np.ones(1 << 25, np.uint64)
    numpy_s = []
    for _ in range(5):
        start = time.perf_counter()
        words.sum()
        numpy_s.append(time.perf_counter() - start)
    pool = _native.WorkerPool(_native.allowed_cpus()[:1])
    assert pool.read_bandwidth(words.ctypes.data, words.nbytes, repeats=5) > 0.6 * words.nbytes / min(numpy_s) / 1e9
    pool.close()


def test_a_full_queue_says_so(pool: _native.WorkerPool, flags: Flags) -> None:
    rows = HostRows(pool, Geometry(), [5])
    lap = rows.plan()
    for value in range(1, 4097):
        rows.attention.arm(lap, 0, ready=flags.ready, ready_value=1, done=flags.done, done_value=value)
    with pytest.raises(RuntimeError, match="4096 armed tasks"):
        rows.attention.arm(lap, 0, ready=flags.ready, ready_value=1, done=flags.done, done_value=4097)
    pool.clear_error()
    assert _native.flag_read(flags.done) == 4096


@pytest.mark.parametrize(
    ("cpus", "options", "message"),
    [
        ([], {}, "cpus is empty"),
        ([8191], {}, "cpus holds CPU 8191, which this process may not use"),
        ([0, 0], {}, "cpus holds CPU 0 twice"),
        ([0], {"spin_us": -1}, "spin_us is -1"),
        ([0], {"nap_us": 0}, "nap_us is 0"),
        ([0], {"deadline_s": float("nan")}, "deadline_s is nan"),
    ],
)
def test_bad_pools_are_refused_by_name_and_value(cpus: list[int], options: dict[str, float], message: str) -> None:
    cpus = [_native.allowed_cpus()[0] if cpu == 0 else cpu for cpu in cpus]
    with pytest.raises(ValueError, match=message.replace("CPU 0", f"CPU {_native.allowed_cpus()[0]}")):
        _native.WorkerPool(cpus, **options)


def test_bad_faults_and_flags_are_refused(pool: _native.WorkerPool, flags: Flags) -> None:
    with pytest.raises(ValueError, match='kind is "explode"'):
        pool.inject_fault("explode")
    with pytest.raises(ValueError, match="worker is 9"):
        pool.inject_fault("die", worker=9)
    with pytest.raises(ValueError, match="after_tasks is -1"):
        pool.inject_fault("die", after_tasks=-1)
    rows = HostRows(pool, Geometry(), [5])
    with pytest.raises(ValueError, match="done is 2"):
        rows.attention.arm(rows.plan(), 0, ready=flags.ready, ready_value=1, done=2, done_value=1)
