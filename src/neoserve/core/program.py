"""An iteration as data: which stage of which sub-batch is enqueued when.

One generator yields the order; `execution/issue.py` enqueues it, `scheduling/cost.py` prices it and
`engine/telemetry.py` draws it, so the three cannot drift apart.

A lap over L layers is cut into L + 1 *steps*, at the point where the host attends:

    step 0        EMBED          PRE(0)    SEND(0)  ATTEND(0)
    step i        RECV(i-1) POST(i-1)  PRE(i)  SEND(i)  ATTEND(i)       0 < i < L
    step L        RECV(L-1) POST(L-1)  HEAD

The last POST is only for rows that the HEAD reads: of a prompt's other rows nothing but their k and v is needed there.

Host attention of layer i runs between the SEND(i) that ends step i and the RECV(i) that begins step i+1,
so whatever stands between those two steps in the program hides it. Two sub-batches in lock-step alternate
their steps; with laps, r steps of the device sub-batch stand between two steps of the host sub-batch.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Op(enum.Enum):
    """What a stage does."""

    EMBED = "embed"  # token ids to hidden states
    PRE = "pre"  # norm, q k v projection, rope
    SEND = "send"  # q, k, v of the host rows to the hand-off slot, raise `ready`
    ATTEND = "attend"  # append k, v; attention of prefill and device-decode rows
    RECV = "recv"  # wait for `done`, attention output of the host rows to the device
    POST = "post"  # output projection, MLP
    HEAD = "head"  # final norm, logits, sampling


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of one sub-batch at one layer. EMBED has layer 0 and HEAD the last layer."""

    op: Op
    layer: int
    sub_batch: int


@dataclass(frozen=True, slots=True)
class Span:
    """The steps [first_step, stop_step) that one sub-batch's lap advances in an iteration.

    `has_host` says whether the sub-batch has host rows: without them there is no SEND and no RECV.
    """

    sub_batch: int
    first_step: int
    stop_step: int
    has_host: bool

    @property
    def num_steps(self) -> int:
        return self.stop_step - self.first_step


def attends_on_host(spans: Sequence[Span]) -> bool:
    """Whether host rows are attended to in a program of these spans."""
    return any(span.has_host for span in spans)


def step_stages(step: int, num_layers: int, sub_batch: int, has_host: bool) -> Iterator[Stage]:
    """The stages of one step of a lap over `num_layers` layers."""
    last = step - 1
    if step == 0:
        yield Stage(Op.EMBED, 0, sub_batch)
    else:
        if has_host:
            yield Stage(Op.RECV, last, sub_batch)
        yield Stage(Op.POST, last, sub_batch)
    if step == num_layers:
        yield Stage(Op.HEAD, last, sub_batch)
        return
    yield Stage(Op.PRE, step, sub_batch)
    if has_host:
        yield Stage(Op.SEND, step, sub_batch)
    yield Stage(Op.ATTEND, step, sub_batch)


def program(num_layers: int, spans: Sequence[Span]) -> Iterator[Stage]:
    """The stages of one iteration in the order in which they are enqueued.

    The spans' steps are merged evenly: each span's k-th of n steps is due at (k + 1/2) / n, so equal spans
    alternate and a span of r times as many steps puts r of them between two of the other's.
    Ties go to the earlier span, so where both run a whole lap, a layer of the second comes after that of the first.
    """
    for span in spans:
        if not 0 <= span.first_step < span.stop_step <= num_layers + 1:
            raise ValueError(f"span {span} does not fit a lap of {num_layers + 1} steps")
    due = sorted(
        ((step - span.first_step + 0.5) / span.num_steps, order, step)
        for order, span in enumerate(spans)
        for step in range(span.first_step, span.stop_step)
    )
    for _, order, step in due:
        yield from step_stages(step, num_layers, spans[order].sub_batch, spans[order].has_host)
