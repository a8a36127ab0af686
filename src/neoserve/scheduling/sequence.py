"""One admitted request, as far as it is planned and as far as it is known."""

from __future__ import annotations

from neoserve.core.plan import BlockIds, Rows, Tier
from neoserve.core.request import Request
from neoserve.kv.manager import Residence


class Sequence:
    """An admitted request. Iterations are planned before earlier ones are known, so there are two states.

    Planned: computed (tokens in the KV once all planned laps are done), num_planned (tokens that they sample),
    in_lap (a lap that has it is not yet planned to its end).
    Known: output (tokens that it generated), committed (tokens certainly in the KV).

    given: leading tokens that are fed by their ids: the prompt, and after a retry what was generated until then.
    pins: laps and migrations of it that are planned and not committed; its blocks and slot stay until there is none.
    migrated_in, migrated_at: iteration of its last migration, and `computed` then; -1 before the first.
    epoch: grows when laps of it are lost, so that what was planned on top of them is recognised and dropped.
    """

    __slots__ = (
        "committed",
        "computed",
        "epoch",
        "finished",
        "given",
        "in_lap",
        "max_new_tokens",
        "migrated_at",
        "migrated_in",
        "num_planned",
        "output",
        "pins",
        "recovering",
        "request",
        "residence",
        "retried",
        "slot",
    )

    def __init__(self, request: Request, slot: int, residence: Residence, max_new_tokens: int) -> None:
        self.request = request
        self.slot = slot
        self.residence = residence
        self.max_new_tokens = max_new_tokens
        self.given = len(request.prompt_token_ids)
        self.computed = 0
        self.committed = 0
        self.num_planned = 0
        self.output: list[int] = []
        self.in_lap = False
        self.pins = 0
        self.epoch = 0
        self.finished = False
        self.recovering = False
        self.retried = False
        self.migrated_in = -1
        self.migrated_at = -1

    @property
    def tier(self) -> Tier:
        return self.residence.tier

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.given

    @property
    def may_run(self) -> bool:
        """Whether the next iteration can have rows of it, as far as the sequence itself is concerned."""
        return not (self.finished or self.in_lap or self.recovering or self.num_planned >= self.max_new_tokens)

    @property
    def num_known(self) -> int:
        """Tokens whose ids are known: the prompt and the output."""
        return len(self.request.prompt_token_ids) + len(self.output)

    def blocks(self, count: int) -> BlockIds:
        """The first `count` blocks of its table."""
        ids = self.residence.table.ids
        return ids if len(ids) == count else ids[:count]

    def decode_rows(self, block_size: int) -> Rows:
        """The row of one decode step, planned: counts as computed from here on."""
        start = self.computed
        self.computed = start + 1
        generated = self.num_planned
        self.num_planned = generated + 1
        return Rows(
            self.request.request_id,
            self.slot,
            self.residence.tier,
            start,
            1,
            None,
            self.blocks(start // block_size + 1),
            (),
            True,
            generated,
        )

    def prefill_rows(self, count: int, block_size: int, staging_block_ids: tuple[int, ...], *, continues: bool) -> Rows:
        """The rows of the next `count` given tokens, planned: count as computed from here on.

        continues: they follow rows of it in the other sub-batch.
        """
        start, stop = self.computed, self.computed + count
        samples = stop == self.given
        rows = Rows(
            self.request.request_id,
            self.slot,
            self.residence.tier,
            start,
            count,
            self.token_ids(start, stop),
            self.blocks(-(-stop // block_size)),
            staging_block_ids,
            samples,
            self.num_planned,
            continues,
        )
        self.computed = stop
        self.num_planned += samples
        return rows

    def token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Ids of known tokens."""
        prompt = self.request.prompt_token_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        return (*prompt, *self.output)[start:stop]

    def can_resume(self) -> bool:
        """Whether lost laps may run again: once in its life, and not if a prompt would have to be computed anew
        whose log-probabilities are partly out."""
        told = self.request.params.prompt_logprobs is not None and self.committed > 0
        return not self.retried and not (told and self._restarts())

    def resume(self) -> None:
        """Go back to what is known; the lost rows are fed again by their ids once nothing of it is in flight."""
        self.retried = True
        self.recovering = self.pins > 0
        self.epoch += 1
        self.in_lap = False
        self.computed = self.committed = 0 if self._restarts() else self.committed
        self.num_planned = len(self.output)
        self.given = self.num_known

    def _restarts(self) -> bool:
        """A first token that was sampled and lost has left its mark on the sequence's sampling state, which begins
        anew only with the first row of the prompt, or with a row that is fed after tokens were generated."""
        return not self.output and self.num_planned > 0
