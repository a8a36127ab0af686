"""Which tier each sequence lives in: placing prompts, growing, and migrating when a pool is too full or has room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered

from neoserve.core.config import ResolvedConfig
from neoserve.core.errors import RequestTooLongError
from neoserve.core.plan import Migration, Tier
from neoserve.core.request import Request
from neoserve.kv.manager import KVManager, Residence
from neoserve.scheduling.laps import Departure
from neoserve.scheduling.policy import Policy
from neoserve.scheduling.sequence import Sequence

_OTHER = {Tier.DEVICE: Tier.HOST, Tier.HOST: Tier.DEVICE}
_MIGRATIONS_TO_DEVICE = 2  # in one iteration: they share the link with the hand-off
_SHARE_WEIGHT = 0.02
_SHARE_PRIOR = 4  # sequences that the assumption before the first one counts for
_SHARE_MARGIN = 1.25


class Placement:
    """Keeps the pools. Between `begin` and the next one it collects the migrations of one iteration.

    A sequence that migrates has no rows in the same iteration, so the copies need not be waited for before the next
    one; the blocks that it leaves are free once the iteration is committed.
    Nobody enters a pool in which someone waits for a block: residents only become fewer until it goes on.
    """

    def __init__(self, config: ResolvedConfig, policy: Policy) -> None:
        device_blocks = 0 if config.offload == "all" else config.device_blocks
        host_blocks = 0 if config.offload == "off" else config.host_blocks
        self.kv = KVManager({Tier.DEVICE: device_blocks, Tier.HOST: host_blocks})
        self.migrations: list[Migration] = []
        self.departures: list[Departure] = []
        self.num_migrated = {Tier.DEVICE: 0, Tier.HOST: 0}
        self._config = config
        self._policy = policy
        self._both = device_blocks > 0 and host_blocks > 0
        self._paused = {Tier.DEVICE: False, Tier.HOST: False}
        self._iteration = -1
        self._mean_share = 1.0  # of its possible tokens that a sequence generates
        self._share = 1.0
        self._num_learned = 0

    @property
    def device_tokens(self) -> int:
        """Tokens that the device pool holds."""
        return self.kv.num_blocks(Tier.DEVICE) * self._config.block_size

    def max_new_tokens(self, request: Request) -> int:
        """Tokens that the request may generate within the context length."""
        assert request.params.max_tokens is not None, "max_tokens is decided before a request reaches the scheduler"
        return min(request.params.max_tokens, self._config.max_model_len - len(request.prompt_token_ids))

    def check_fits(self, request: Request) -> None:
        """Raises `RequestTooLongError` when no pool could ever hold the request at its longest."""
        config, prompt = self._config, len(request.prompt_token_ids)
        if prompt >= config.max_model_len:
            raise RequestTooLongError(
                f"the prompt has {prompt} tokens; expected fewer than the context length {config.max_model_len}",
                "prompt",
            )
        worst = self._worst_blocks(request)
        largest = max(self.kv.num_blocks(tier) for tier in Tier)
        if worst > largest:
            raise RequestTooLongError(
                f"prompt and max_tokens need {worst * config.block_size} tokens of KV; the larger pool holds "
                f"{largest * config.block_size}: shorten the prompt, lower max_tokens or raise the host memory",
                "max_tokens",
            )
        if worst > self.kv.num_blocks(Tier.DEVICE) and not self.can_stage(prompt):
            raise RequestTooLongError(
                f"the prompt has {prompt} tokens and must prefill through the staging area, which holds "
                f"{config.staging_blocks * config.block_size}: shorten the prompt or enlarge the staging area",
                "prompt",
            )

    def can_stage(self, num_tokens: int) -> bool:
        """Whether a sequence can be fed so many tokens by their ids if it lives on the host."""
        return self._config.blocks_for(num_tokens) <= self._config.staging_blocks

    def learn_length(self, share: float) -> None:
        """A sequence ended after this share of the tokens that it might have generated."""
        self._num_learned += 1
        self._mean_share += max(_SHARE_WEIGHT, 1 / (self._num_learned + _SHARE_PRIOR)) * (share - self._mean_share)
        self._share = min(1.0, _SHARE_MARGIN * self._mean_share)

    @property
    def expected_share(self) -> float:
        """Of the tokens that it might generate, how many a sequence is expected to."""
        return self._share if self._policy.expected_share is None else self._policy.expected_share

    def begin(self, iteration: int) -> None:
        """Forget the migrations of the iteration before."""
        self.migrations, self.departures = [], []
        self._iteration = iteration

    def admit(self, request: Request, *, host_only: bool, host_pays: Callable[[], bool]) -> Residence | None:
        """Place a prompt in a pool; `None` when it has to wait.

        host_only: an older prompt of this iteration went to the host. host_pays: whether more host rows would pay.
        A request that the device pool can never hold goes to the host at once.
        """
        blocks = self._config.blocks_for(len(request.prompt_token_ids))
        worst = self._worst_blocks(request)
        fits_device = self.fits_device(request)
        if fits_device and not host_only and self._can_enter(Tier.DEVICE, blocks, worst):
            return self.kv.enter(Tier.DEVICE, blocks, worst)
        if not self.can_stage(len(request.prompt_token_ids)) or not self._can_enter(Tier.HOST, blocks, worst):
            return None
        return self.kv.enter(Tier.HOST, blocks, worst) if not fits_device or host_pays() else None

    def fits_device(self, request: Request) -> bool:
        """Whether the device pool could ever hold the request."""
        return self._worst_blocks(request) <= self.kv.num_blocks(Tier.DEVICE)

    def grow(self, tier: Tier, decoding: list[Sequence], running: Ordered[Sequence]) -> list[Sequence]:
        """Give each decoding sequence of a pool room for its next token; returns those that may run.

        Both lists are oldest first. Where the device pool has no block to spare, its newest migrate; where the host
        pool has none, the sequence itself does; else it waits.
        """
        self._paused[tier] = False
        block_size = self._config.block_size
        at_edge = [s for s in decoding if s.computed % block_size == 0]
        wanting = {s.residence: s for s in at_edge if s.computed == s.residence.held * block_size}
        if not wanting:
            return decoding
        waiting = set()
        for residence in self.kv.grow(tier, list(wanting)):
            sequence = wanting[residence]
            if not self._make_room(sequence, running):
                waiting.add(sequence)
                self._paused[tier] = self._paused[tier] or sequence.tier is tier
        return [s for s in decoding if s not in waiting and self.stays(s)]

    def stays(self, sequence: Sequence) -> bool:
        """Whether the sequence does not migrate in this iteration."""
        return sequence.migrated_in != self._iteration

    def relieve_device(self, running: Ordered[Sequence]) -> None:
        """Migrate the newest of the device pool while its residents can hardly grow and would soon have to wait.

        `running` is oldest first.
        """
        if not self._both or not self._is_too_full():
            return
        for sequence in reversed([s for s in running if s.tier is Tier.DEVICE]):
            self._try_migrate(sequence)
            if not self._is_too_full():
                break

    def refill_device(self, decoding_on_host: Iterable[Sequence]) -> None:
        """Migrate sequences of the host pool to room in the device pool, those that need most of it first."""
        if not self._both:
            return
        room = self._available(Tier.DEVICE)
        fitting = [s for s in decoding_on_host if s.residence.held <= room]
        left = _MIGRATIONS_TO_DEVICE
        for sequence in sorted(fitting, key=lambda s: s.residence.held + s.residence.remaining, reverse=True):
            left -= self._try_migrate(sequence)
            if left == 0:
                break

    def force_migration(self, running: Iterable[Sequence]) -> None:
        """For tests: the sequence that has been in its tier the longest changes it, if it can."""
        for sequence in sorted(running, key=lambda s: s.migrated_in):
            if self._try_migrate(sequence):
                break

    def _is_too_full(self) -> bool:
        growing = self.kv.growth(Tier.DEVICE, 1)
        soon = growing * self._policy.pressure_growth_tokens // self._config.block_size
        return self._available(Tier.DEVICE) < soon and not self._lasts(Tier.DEVICE)

    def _lasts(self, tier: Tier) -> bool:
        """Whether a shortage is a matter of moments: even if all run as long as they may, they are short of a block
        each at most, because some reach the end of a block before others end."""
        return self.kv.fits_ahead(tier, 0, 0, share=1.0, margin=-1)

    def _worst_blocks(self, request: Request) -> int:
        """Blocks when it ends at its latest: the last token that it generates is never fed."""
        return self._config.blocks_for(len(request.prompt_token_ids) + self.max_new_tokens(request) - 1)

    def _available(self, tier: Tier) -> int:
        """Free blocks, and those that migrations of this iteration will have freed."""
        leaving = sum(d.residence.held for d in self.departures if d.residence.tier is tier)
        return self.kv.num_free(tier) + leaving

    def _can_enter(self, tier: Tier, held: int, worst: int) -> bool:
        """Nobody waits there, it stays safe, and nobody is expected to have to wait."""
        if self._paused[tier] or not self.kv.can_enter(tier, held, worst):
            return False
        return self.kv.fits_ahead(tier, held, worst, self.expected_share)

    def _make_room(self, sequence: Sequence, running: Ordered[Sequence]) -> bool:
        """Find a block for a sequence whose pool has none to spare; whether it got it."""
        if not self._both or self._lasts(sequence.tier):
            return False
        if sequence.tier is Tier.HOST:
            self._try_migrate(sequence)
            return False
        for newest in reversed([s for s in running if s.tier is Tier.DEVICE]):
            if not self._try_migrate(newest):
                continue
            if newest is sequence:
                return False
            if not self.kv.grow(Tier.DEVICE, [sequence.residence]):
                return True
        return False

    def _try_migrate(self, sequence: Sequence) -> bool:
        """Move a sequence to the other pool if that stays safe."""
        source = sequence.residence
        target = _OTHER[source.tier]
        if not self._both or not self._may_migrate(sequence):
            return False
        worst = source.held + source.remaining
        if not self._can_enter(target, source.held, worst):
            return False
        residence = self.kv.enter(target, source.held, worst)
        self.kv.settle(source)
        sequence.residence = residence
        sequence.pins += 1
        sequence.migrated_in = self._iteration
        sequence.migrated_at = sequence.computed
        self.departures.append(Departure(sequence, source))
        self.num_migrated[target] += 1
        count = self._config.blocks_for(sequence.computed)
        if count:
            ids = (source.table.ids[:count], residence.table.ids[:count])
            self.migrations.append(
                Migration(sequence.request.request_id, source.tier, *ids, num_tokens=sequence.computed)
            )
        return True

    def _may_migrate(self, sequence: Sequence) -> bool:
        """Not while a lap has it, and not twice without a step in between: no sequence moves instead of running."""
        if not sequence.may_run or sequence.migrated_at == sequence.computed:
            return False
        to_host = sequence.tier is Tier.DEVICE
        return not (to_host and sequence.is_prefilling) or self.can_stage(sequence.given)
