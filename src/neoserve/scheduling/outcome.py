"""What a committed iteration means for its sequences: tokens, ends, losses, and what is free again."""

from __future__ import annotations

from collections.abc import Iterable

from neoserve.core.plan import Rows, SampledToken, Tier
from neoserve.core.request import FinishReason, TokenEvent
from neoserve.scheduling.laps import OpenIteration
from neoserve.scheduling.placement import Placement
from neoserve.scheduling.sequence import Sequence


class Outcome:
    """Ends sequences, and frees their blocks and slots once nothing in flight uses them.

    running, free_slots: the scheduler's; sequences that are gone are taken out of the one, their slots put into the
    other. num_prompt_tokens: prompt tokens computed so far. num_tokens: tokens decoded so far, by tier.
    """

    def __init__(self, placement: Placement, running: dict[str, Sequence], free_slots: list[int]) -> None:
        self.num_prompt_tokens = 0
        self.num_tokens = {Tier.DEVICE: 0, Tier.HOST: 0}
        self._placement = placement
        self._running = running
        self._free_slots = free_slots

    def take_tokens(self, done: OpenIteration, tokens: tuple[SampledToken, ...]) -> list[TokenEvent]:
        """Append the tokens of the laps that ended; rows of sequences that ended or lost earlier laps are dropped."""
        ended = [lap for lap in done.laps if lap.sub_batch in done.plan.ends]
        num_rows = sum(len(lap.sequences) for lap in ended)
        assert len(tokens) == num_rows, (
            f"iteration {done.plan.iteration} brought {len(tokens)} tokens for {num_rows} rows"
        )
        events = []
        sampled = iter(tokens)
        for lap in ended:
            for sequence, epoch, rows, token in zip(
                lap.sequences, lap.epochs, lap.sub_batch.rows, sampled, strict=False
            ):
                if not sequence.finished and sequence.epoch == epoch:
                    event = self._take(sequence, rows, token)
                    if event is not None:
                        events.append(event)
        return events

    def lose(self, done: OpenIteration, error: str) -> list[TokenEvent]:
        """All laps of a failed iteration are lost, also those that would have gone on."""
        events = []
        for lap in done.laps:
            lap.lost = True
            for sequence, epoch in zip(lap.sequences, lap.epochs, strict=True):
                if sequence.finished or sequence.epoch != epoch:
                    continue
                if self._can_resume(sequence):
                    sequence.resume()
                    continue
                self.end(sequence)
                events.append(TokenEvent(sequence.request.request_id, (), finish_reason="error", error=error))
        return events

    def close(self, done: OpenIteration, num_steps: int) -> None:
        """Nothing of the iteration is in flight any more."""
        for lap in done.laps:
            lap.open_iterations -= 1
            if lap.open_iterations == 0 and (lap.lost or lap.next_step == num_steps):
                self._unpin(lap.sequences)
        for departure in done.departures:
            self._placement.kv.leave(departure.residence)
        self._unpin(departure.sequence for departure in done.departures)

    def end(self, sequence: Sequence) -> None:
        """The sequence runs no further; it is gone now, or once nothing in flight uses its blocks."""
        sequence.finished = True
        self._placement.learn_length(len(sequence.output) / sequence.max_new_tokens)
        self._placement.kv.settle(sequence.residence)
        if sequence.pins == 0:
            self._release(sequence)

    def _take(self, sequence: Sequence, rows: Rows, sampled: SampledToken) -> TokenEvent | None:
        """One row's result: what is known now, and the event that tells of it."""
        sequence.committed = rows.start + rows.count
        is_decode = rows.token_ids is None
        if not is_decode:
            self.num_prompt_tokens += rows.count
        token_id = sampled.token_id
        if token_id is None:
            if not sampled.prompt_logprobs:
                return None
            return TokenEvent(rows.request_id, (), (), sampled.prompt_logprobs)
        sequence.output.append(token_id)
        self.num_tokens[rows.tier] += is_decode
        reason = _finish_reason(sequence, token_id)
        if reason is not None:
            self.end(sequence)
        return TokenEvent(
            rows.request_id,
            (token_id,),
            () if sampled.logprobs is None else (sampled.logprobs,),
            sampled.prompt_logprobs,
            reason,
            token_id if reason == "stop" else None,
            int(is_decode and rows.tier is Tier.HOST),
        )

    def _can_resume(self, sequence: Sequence) -> bool:
        lost_samples = sequence.num_planned > len(sequence.output)
        on_host = sequence.tier is Tier.HOST
        return sequence.can_resume(lost_samples) and (not on_host or self._placement.can_stage(sequence.num_known))

    def _unpin(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            sequence.pins -= 1
            if sequence.pins == 0:
                sequence.recovering = False
                if sequence.finished:
                    self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._placement.kv.leave(sequence.residence)
        del self._running[sequence.request.request_id]
        self._free_slots.append(sequence.slot)


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    """Why the sequence ends with its latest token; a stop id counts only after `min_tokens`."""
    request, generated = sequence.request, len(sequence.output)
    if token_id in request.stop_ids and generated > request.params.min_tokens:
        return "stop"
    return "length" if generated >= sequence.max_new_tokens else None
