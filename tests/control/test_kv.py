"""The pools: every block has one owner, and nobody can get stuck."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoserve.core.plan import Tier
from neoserve.kv.blocks import BlockPool, BlockTable
from neoserve.kv.manager import KVManager, Residence


def brute_force_safe(free: int, needs: list[tuple[int, int]]) -> bool:
    """Whether some order lets everyone reach its worst case; needs are (remaining, held)."""

    def works(order: tuple[tuple[int, int], ...]) -> bool:
        available = free
        for remaining, held in order:
            if remaining > available:
                return False
            available += held
        return True

    return any(works(order) for order in permutations(needs))


def needs_of(kv: KVManager) -> list[tuple[int, int]]:
    return [(resident.remaining, resident.held) for resident in kv.residents(Tier.DEVICE)]


def one_pool(num_blocks: int) -> KVManager:
    return KVManager({Tier.DEVICE: num_blocks, Tier.HOST: 0})


def test_a_table_grows_under_views_that_stay_right() -> None:
    table = BlockTable([5, 3])
    views = []
    for block in range(10, 60):
        views.append((table.ids, table.ids.tolist()))
        table.extend([block])
    assert table.ids.tolist() == [5, 3, *range(10, 60)]
    assert all(view.tolist() == before for view, before in views)
    with pytest.raises(ValueError, match="read-only"):
        table.ids[0] = 1
    assert table.ids is table.ids
    assert table.ids.dtype == np.int32


def test_blocks_given_back_are_taken_again() -> None:
    pool = BlockPool(4)
    first = pool.take(3)
    pool.give(first[1:])
    second = pool.take(3)
    assert sorted([first[0], *second]) == [0, 1, 2, 3]
    pool.check_integrity([first[0], *second])
    with pytest.raises(AssertionError, match="two owners"):
        pool.check_integrity([*second, second[0]])


def test_blocks_are_taken_in_as_few_runs_as_can_be() -> None:
    pool = BlockPool(20)
    pool.take(20)
    for ids in ([0], [2, 3], [5, 6, 7], [10, 11, 12, 13]):
        pool.give(ids)
    assert pool.take(3) == [5, 6, 7]  # the shortest run that is long enough
    assert pool.take(1) == [0]
    assert pool.take(5) == [10, 11, 12, 13, 2]  # none is: the longest first
    assert pool.take(1) == [3]
    assert pool.num_free == 0
    assert pool.take(0) == []
    pool.give([4, 9])
    pool.check_integrity(set(range(20)) - {4, 9})


def test_entry_is_refused_when_the_residents_could_block_each_other() -> None:
    kv = one_pool(10)
    kv.enter(Tier.DEVICE, held=2, worst=8)
    assert kv.can_enter(Tier.DEVICE, held=2, worst=8)  # 6 are free, and either can finish with 6
    assert not kv.can_enter(Tier.DEVICE, held=3, worst=9)  # 5 would be free, and both would need 6
    assert not kv.can_enter(Tier.DEVICE, held=1, worst=11)


def test_the_last_blocks_go_to_whom_they_let_finish() -> None:
    kv = one_pool(10)
    first = kv.enter(Tier.DEVICE, held=3, worst=8)
    second = kv.enter(Tier.DEVICE, held=2, worst=7)
    assert kv.num_free(Tier.DEVICE) == 5
    assert kv.grow(Tier.DEVICE, [first, second]) == [second]  # 4 left for the first's 4; the second would take one
    assert (first.remaining, second.remaining) == (4, 5)
    kv.leave(first)
    assert kv.grow(Tier.DEVICE, [second]) == []
    kv.check_integrity()


def test_who_enters_is_expected_to_fit_until_it_ends() -> None:
    kv = one_pool(20)
    for _ in range(3):
        kv.enter(Tier.DEVICE, held=2, worst=6)
    assert not kv.fits_ahead(Tier.DEVICE, held=2, worst=6, share=1.0, margin=0)  # 4 x 6 at the same moment
    assert kv.fits_ahead(Tier.DEVICE, held=2, worst=6, share=0.5, margin=0)
    assert kv.fits_ahead(Tier.DEVICE, held=2, worst=2, share=1.0, margin=0)
    assert not kv.fits_ahead(Tier.DEVICE, held=2, worst=5, share=0.75, margin=1)


@given(data=st.data(), num_blocks=st.integers(1, 12))
def test_grants_are_exactly_those_that_stay_safe(data: st.DataObject, num_blocks: int) -> None:
    """Random entries, growth and departures of up to five residents, against all orders tried by force."""
    kv = one_pool(num_blocks)
    residents: list[Residence] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(("enter", "grow", "leave", "settle")))
        if action == "enter" and len(residents) < 5:
            held = data.draw(st.integers(0, num_blocks))
            worst = data.draw(st.integers(held, num_blocks))
            free = kv.num_free(Tier.DEVICE) - held
            expected = free >= 0 and brute_force_safe(free, [*needs_of(kv), (worst - held, held)])
            assert kv.can_enter(Tier.DEVICE, held, worst) == expected
            if expected:
                residents.append(kv.enter(Tier.DEVICE, held, worst))
        elif action == "grow" and residents:
            growing = [r for r in data.draw(st.permutations(residents)) if r.remaining]
            before = [(r, r.held) for r in growing]
            check_growth_by_force(kv, growing)
            assert all(0 <= r.held - held <= 1 for r, held in before)
        elif action == "leave" and residents:
            kv.leave(residents.pop(data.draw(st.integers(0, len(residents) - 1))))
        elif action == "settle" and residents:
            kv.settle(data.draw(st.sampled_from(residents)))
        kv.check_integrity()
        assert brute_force_safe(kv.num_free(Tier.DEVICE), needs_of(kv))


def check_growth_by_force(kv: KVManager, growing: list[Residence]) -> None:
    """Each grant in turn is given exactly if the pool stays safe with it."""
    free = kv.num_free(Tier.DEVICE)
    needs = {resident: (resident.remaining, resident.held) for resident in kv.residents(Tier.DEVICE)}
    expected = []
    for resident in growing:
        remaining, held = needs[resident]
        granted = needs | {resident: (remaining - 1, held + 1)}
        if free and brute_force_safe(free - 1, list(granted.values())):
            needs, free = granted, free - 1
        else:
            expected.append(resident)
    assert kv.grow(Tier.DEVICE, growing) == expected


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_whoever_needs_least_can_always_go_on(sizes: list[tuple[int, int]]) -> None:
    """A pool that lets in all it can is always able to run dry."""
    kv = one_pool(40)
    residents = [
        kv.enter(Tier.DEVICE, held, held + more) for held, more in sizes if kv.can_enter(Tier.DEVICE, held, held + more)
    ]
    while residents:
        kv.grow(Tier.DEVICE, [resident for resident in residents if resident.remaining])
        least = min(residents, key=lambda resident: resident.remaining)
        if not least.remaining:
            residents.remove(least)
            kv.leave(least)
        else:
            assert kv.grow(Tier.DEVICE, [least]) == []
    assert kv.num_free(Tier.DEVICE) == 40
