"""Who holds which blocks of the two pools, and that nobody can get stuck.

Each pool is kept *safe* in the sense of Dijkstra's banker: every resident has named its worst need, and there is an
order in which all residents can run to it, each with the free blocks and those of the residents that ended before
it. With one kind of resource the order by remaining need is the best one, so a pool is safe exactly if that order
works. Entry and growth are granted only if the pool stays safe; hence the resident with the least remaining need
can always grow, and as long as nobody enters, everyone ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import numpy as np

from neoserve.core.plan import Tier
from neoserve.kv.blocks import BlockPool, BlockTable

_by_remaining = attrgetter("remaining")


class Residence:
    """One sequence's blocks in one pool. remaining: blocks that it may still need in the worst case."""

    __slots__ = ("remaining", "table", "tier")

    def __init__(self, tier: Tier, table: BlockTable, remaining: int) -> None:
        self.tier = tier
        self.table = table
        self.remaining = remaining

    @property
    def held(self) -> int:
        return len(self.table)


class _Ledger:
    """One pool and its residents."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.residents: dict[Residence, None] = {}
        self.num_left = 0  # residents that left, ever
        self.outstanding = 0  # sum of the residents' remaining needs

    def is_safe_with(self, held: int, remaining: int) -> bool:
        """Whether the pool is safe once a newcomer holds `held` blocks and may need `remaining` more."""
        free = self.pool.num_free - held
        if free < 0:
            return False
        if self.outstanding + remaining <= free:
            return True
        needs = [(resident.remaining, resident.held) for resident in self.residents]
        needs.append((remaining, held))
        needs.sort()
        for need, released in needs:
            if need > free:
                return False
            free += released
        return True

    def grant(self, resident: Residence) -> None:
        resident.table.extend(self.pool.take(1))
        resident.remaining -= 1
        self.outstanding -= 1


class _Order:
    """The residents of a pool by remaining need, each with its slack: blocks it would have to spare at its turn.

    A block for one resident costs those before it one block of slack and the others nothing, so it is safe exactly
    if all with strictly less remaining need have slack.
    """

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger
        self._order = sorted(ledger.residents, key=_by_remaining)
        held = np.array([resident.held for resident in self._order], dtype=np.int64)
        self._remaining = [resident.remaining for resident in self._order]
        self._slack = ledger.pool.num_free + np.cumsum(held) - held - np.array(self._remaining, dtype=np.int64)
        self._place = {resident: place for place, resident in enumerate(self._order)}

    def grow(self, resident: Residence) -> bool:
        """Grant one block if the pool stays safe."""
        if self._ledger.pool.num_free == 0:
            return False
        first = bisect_left(self._remaining, resident.remaining)
        if first and self._slack[:first].min() < 1:
            return False
        self._move_ahead_of_ties(resident, first)
        self._slack[:first] -= 1
        self._remaining[first] -= 1
        self._ledger.grant(resident)
        return True

    def _move_ahead_of_ties(self, resident: Residence, first: int) -> None:
        """Swap the resident with the first of those that need as much, so that it may need one less in its place."""
        place = self._place[resident]
        other = self._order[first]
        self._slack[first + 1 : place + 1] += resident.held - other.held
        self._order[first], self._order[place] = resident, other
        self._place[resident], self._place[other] = first, place


class KVManager:
    """Both pools. Not one tensor: it only accounts."""

    def __init__(self, num_blocks: Mapping[Tier, int]) -> None:
        self._ledgers = {tier: _Ledger(count) for tier, count in num_blocks.items()}

    def num_blocks(self, tier: Tier) -> int:
        return self._ledgers[tier].pool.num_blocks

    def num_free(self, tier: Tier) -> int:
        return self._ledgers[tier].pool.num_free

    def num_used(self, tier: Tier) -> int:
        return self.num_blocks(tier) - self.num_free(tier)

    @property
    def num_left(self) -> int:
        """Residents that ever left a pool: while it stays the same, who could not enter still cannot."""
        return sum(ledger.num_left for ledger in self._ledgers.values())

    def residents(self, tier: Tier) -> Iterator[Residence]:
        """The residents of a pool, those about to leave included."""
        return iter(self._ledgers[tier].residents)

    def growth(self, tier: Tier, blocks_each: int) -> int:
        """Blocks that the residents take if each grows by `blocks_each`, or by what it needs if that is less."""
        return sum(min(resident.remaining, blocks_each) for resident in self._ledgers[tier].residents)

    def can_enter(self, tier: Tier, held: int, worst: int) -> bool:
        """Whether a newcomer that holds `held` blocks now and at most `worst` later leaves the pool safe."""
        return self._ledgers[tier].is_safe_with(held, worst - held)

    def fits_ahead(self, tier: Tier, held: int, worst: int, share: float, margin: int = 0) -> bool:
        """Whether nobody will have to wait for a block if a newcomer enters, everyone grows at the same pace, and
        each leaves after `share` of its remaining need. Where this fails, a safe pool still works, but in turns.

        margin: blocks to spare for each resident; negative: blocks that each may be short of.
        """
        ledger = self._ledgers[tier]
        residents = ledger.residents
        count = len(residents) + 1
        used = ledger.pool.num_blocks - ledger.pool.num_free + held
        if used + share * (ledger.outstanding + worst - held) <= ledger.pool.num_blocks - margin * count:
            return True
        blocks = np.fromiter((r.held for r in residents), dtype=np.int64, count=count - 1)
        needs = np.fromiter((r.remaining for r in residents), dtype=np.float64, count=count - 1)
        blocks, needs = np.append(blocks, held), share * np.append(needs, worst - held)
        order = np.argsort(needs)
        blocks, needs = blocks[order], needs[order]
        # When the k-th leaves, it and those after it have each grown by its need.
        demand = np.cumsum(blocks[::-1])[::-1] + (needs + margin) * np.arange(count, 0, -1)
        return bool(demand.max() <= ledger.pool.num_blocks)

    def enter(self, tier: Tier, held: int, worst: int) -> Residence:
        """Take `held` blocks; the caller has asked `can_enter`."""
        ledger = self._ledgers[tier]
        residence = Residence(tier, BlockTable(ledger.pool.take(held)), worst - held)
        ledger.residents[residence] = None
        ledger.outstanding += worst - held
        return residence

    def grow(self, tier: Tier, wanting: Sequence[Residence]) -> list[Residence]:
        """One more block for each, in this order, where the pool stays safe; returns those that got none."""
        ledger = self._ledgers[tier]
        if max(ledger.outstanding, len(wanting)) <= ledger.pool.num_free:
            for residence in wanting:
                ledger.grant(residence)
            return []
        order = _Order(ledger)
        return [residence for residence in wanting if not order.grow(residence)]

    def settle(self, residence: Residence) -> None:
        """The resident needs nothing more and will leave once what is in flight has ended."""
        self._ledgers[residence.tier].outstanding -= residence.remaining
        residence.remaining = 0

    def leave(self, residence: Residence) -> None:
        """Free the resident's blocks."""
        self.settle(residence)
        ledger = self._ledgers[residence.tier]
        del ledger.residents[residence]
        ledger.num_left += 1
        ledger.pool.give(residence.table.ids.tolist())

    def check_integrity(self) -> None:
        """Free plus used blocks are each pool, no block has two owners, each pool is safe."""
        for ledger in self._ledgers.values():
            ledger.pool.check_integrity(block for r in ledger.residents for block in r.table.ids.tolist())
            assert all(resident.remaining >= 0 for resident in ledger.residents)
            assert ledger.outstanding == sum(resident.remaining for resident in ledger.residents)
            assert ledger.is_safe_with(0, 0), "a pool is not safe"
