"""What rows bring to the layers, as costs are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from neoserve.core.plan import SubBatch, Tier


@dataclass(frozen=True, slots=True)
class Load:
    """What a sub-batch brings to each layer; the sum of two loads is the load of their rows together.

    samples: rows that yield a token. prefill_pairs: pairs of a prefill row and a KV token that it attends to.
    staged_rows: prefill rows of HOST sequences. staged_tokens: KV tokens of earlier chunks that they bring back to the
    staging area.
    """

    rows: int = 0
    samples: int = 0
    prefill_rows: int = 0
    prefill_pairs: float = 0.0
    staged_rows: int = 0
    staged_tokens: int = 0
    device_tokens: int = 0
    host_rows: int = 0
    host_tokens: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.rows + other.rows,
            self.samples + other.samples,
            self.prefill_rows + other.prefill_rows,
            self.prefill_pairs + other.prefill_pairs,
            self.staged_rows + other.staged_rows,
            self.staged_tokens + other.staged_tokens,
            self.device_tokens + other.device_tokens,
            self.host_rows + other.host_rows,
            self.host_tokens + other.host_tokens,
        )

    @classmethod
    def prefill(cls, tier: Tier, start: int, count: int, samples: bool, *, continues: bool = False) -> Load:
        """One chunk of a prompt: `count` rows after `start` tokens; of one that `continues`, those are staged."""
        pairs = count * (start + (count + 1) / 2)
        if tier is Tier.DEVICE:
            return cls(count, int(samples), count, pairs)
        return cls(count, int(samples), count, pairs, count, 0 if continues else start)

    @classmethod
    def device_decode(cls, num_rows: int, num_tokens: int) -> Load:
        """Decode rows of DEVICE sequences that hold `num_tokens` tokens together."""
        return cls(rows=num_rows, samples=num_rows, device_tokens=num_tokens)

    @classmethod
    def host_decode(cls, num_rows: int, num_tokens: int) -> Load:
        """Decode rows of HOST sequences that hold `num_tokens` tokens together."""
        return cls(rows=num_rows, samples=num_rows, host_rows=num_rows, host_tokens=num_tokens)

    @classmethod
    def of(cls, sub_batch: SubBatch) -> Load:
        """The load of a whole sub-batch."""
        device, host = sub_batch.device_decode, sub_batch.host_decode
        load = cls.device_decode(len(device), sum(rows.length for rows in device))
        load += cls.host_decode(len(host), sum(rows.length for rows in host))
        for rows in sub_batch.prefill:
            load += cls.prefill(rows.tier, rows.start, rows.count, rows.samples, continues=rows.continues)
        return load
