"""Sampling against formulas written the long way, in numpy float64, and against the distributions it must draw from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from neoserve.core.plan import Rows, Tier
from neoserve.core.request import Request, SamplingParams
from neoserve.execution.logprobs import token_logprobs
from neoserve.execution.noise import gumbel_noise, row_keys
from neoserve.execution.sampling import SamplingState

CPU = torch.device("cpu")
V = 40


def request(prompt: Sequence[int] = (1, 2, 3), stop_ids: Sequence[int] = (), **params: Any) -> Request:
    return Request("r", tuple(prompt), SamplingParams(**{"max_tokens": 100, **params}), tuple(stop_ids), 0.0)


def rows(slot: int, num_generated: int = 0) -> Rows:
    return Rows(str(slot), slot, Tier.DEVICE, 0, 1, None, (0,), (), True, num_generated)


def random_logits(num_rows: int, vocab_size: int = V, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def state_of(*requests: Request, vocab_size: int = V, seed: int = 0) -> SamplingState:
    """A state whose slot i holds request i."""
    state = SamplingState(len(requests), vocab_size, CPU, seed)
    for slot, one in enumerate(requests):
        state.add(slot, one)
    return state


def draws(logits_V: torch.Tensor, count: int, **params: Any) -> np.ndarray:
    """How often each token is drawn as the first `count` tokens of one request."""
    state = state_of(request(**{"seed": 1, **params}), vocab_size=len(logits_V))
    batch = state.batch([rows(0, index) for index in range(count)])
    ids = state.sample(logits_V.expand(count, -1), batch)
    return np.bincount(ids.numpy(), minlength=len(logits_V))


def distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The probabilities that parameters ask for, limit after limit, on a list sorted by probability."""

    def softmax(x: np.ndarray) -> np.ndarray:
        exp = np.exp(x - x.max())
        return exp / exp.sum()

    scores = logits.astype(np.float64) / temperature
    kept = np.ones(len(scores), bool)
    probabilities = softmax(scores)
    kept &= probabilities >= min_p * probabilities.max()
    order = sorted(np.flatnonzero(kept), key=lambda i: -scores[i])
    order = order[: top_k or None]
    probabilities = softmax(scores[order])
    mass, nucleus = 0.0, []
    for token, probability in zip(order, probabilities, strict=True):
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probability
    result = np.zeros(len(scores))
    result[nucleus] = softmax(scores[nucleus])
    return result


def assert_drawn_from(counts: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's chi-squared at about 5 sigma over the tokens that can come, and none of those that cannot."""
    assert not counts[expected == 0].any()
    likely = expected * counts.sum() >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    ideal = np.append(expected[likely], expected[~likely].sum()) * counts.sum()
    observed, ideal = observed[ideal > 0], ideal[ideal > 0]
    freedom = max(1, len(ideal) - 1)
    assert ((observed - ideal) ** 2 / ideal).sum() < freedom + 5 * math.sqrt(2 * freedom) + 10


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": V},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.6, "top_k": 10, "min_p": 0.3},
    ],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(params: dict[str, Any]) -> None:
    logits = random_logits(1)[0]
    assert_drawn_from(draws(logits, 20_000, **params), distribution(logits.numpy(), **params))


def test_each_row_of_a_batch_has_its_own_limits() -> None:
    limits = [{"top_k": 3}, {"top_k": 30, "top_p": 0.7}, {"min_p": 0.2}, {"top_p": 0.5}, {"temperature": 0.8}]
    logits = random_logits(1, seed=4)[0]
    count = 10_000
    state = state_of(*(request(seed=seed, **params) for seed, params in enumerate(limits)))
    batch = state.batch([rows(slot, index) for slot in range(len(limits)) for index in range(count)])
    ids = state.sample(logits.expand(count * len(limits), -1), batch).view(len(limits), count)
    for drawn, params in zip(ids, limits, strict=True):
        assert_drawn_from(np.bincount(drawn.numpy(), minlength=V), distribution(logits.numpy(), **params))
        few = state.batch([rows(limits.index(params), index) for index in range(50)])
        assert torch.equal(state.sample(logits.expand(50, -1), few), drawn[:50])
    pair = state.batch([rows(slot, index) for index in range(2_000) for slot in (0, 1)])
    assert torch.equal(state.sample(logits.expand(4_000, -1), pair).view(-1, 2).T, ids[:2, :2_000])


def test_the_first_token_of_many_seeds_is_drawn_from_the_distribution() -> None:
    logits = random_logits(1, seed=5)[0]
    state = state_of(*(request(seed=seed) for seed in range(5_000)))
    ids = state.sample(logits.expand(5_000, -1), state.batch([rows(slot) for slot in range(5_000)]))
    assert_drawn_from(np.bincount(ids.numpy(), minlength=V), distribution(logits.numpy()))


def test_noise_is_splitmix64_and_independent_of_vocabulary_and_batch() -> None:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    seeds, indices = [0, 1, 2**64 - 1], [0, 5, 70_000]
    keys = torch.from_numpy(row_keys(np.array(seeds, np.uint64), np.array(indices, np.int64)))
    noise = gumbel_noise(keys, 500)
    for row, (seed, index) in enumerate(zip(seeds, indices, strict=True)):
        key = mix((mix(seed) + (index + 1) * gamma) & mask)
        for token in (0, 1, 499):
            uniform = ((mix((key + (token + 1) * gamma) & mask) >> 32) + 0.5) / 2**32
            # Bit 32 is the one that the shortened hash may get wrong: half a part in 2**31.
            expected = -math.log(-math.log1p(-uniform))
            assert noise[row, token].item() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(gumbel_noise(keys[1:2], 60), noise[1:2, :60])


def test_noise_is_finite_and_gumbel() -> None:
    noise = gumbel_noise(torch.arange(100), 20_000).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    # Rows and neighbouring tokens do not go together.
    together = torch.stack((noise[:-1].flatten(), noise[1:].flatten()))
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.005
    assert noise.max() > 13, "two million draws reach far into the tail"


def test_a_seeded_request_does_not_depend_on_what_else_is_in_the_batch() -> None:
    logits = random_logits(4, seed=3)
    seeded = request(seed=7, temperature=1.2, top_p=0.9)
    others = [
        request(temperature=0.0),
        request(top_k=3, repetition_penalty=1.5),
        request(min_p=0.2, logit_bias={4: 5.0}, min_tokens=5, stop_ids=[9]),
    ]
    alone = state_of(seeded)
    together = state_of(*others, seeded, seed=99)
    for index in range(50):
        batch = together.batch([rows(0, index), rows(3, index), rows(1, index), rows(2, index)])
        mixed = together.sample(logits[[1, 0, 2, 3]], batch)
        assert alone.sample(logits[:1], alone.batch([rows(0, index)]))[0] == mixed[1]


def test_requests_without_a_seed_differ_and_repeat_with_the_engine() -> None:
    logits = torch.zeros(8, 1000)
    batch = [rows(slot) for slot in range(8)]

    def ids(engine_seed: int) -> list[int]:
        state = state_of(*[request()] * 8, vocab_size=1000, seed=engine_seed)
        return state.sample(logits, state.batch(batch)).tolist()

    assert len(set(ids(0))) > 6
    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_greedy_rows_take_the_likeliest_in_any_company() -> None:
    logits = random_logits(3)
    state = state_of(request(temperature=0.0), request(seed=1, top_p=0.5), request(temperature=0.0, top_p=0.1))
    ids = state.sample(logits, state.batch([rows(0), rows(1), rows(2)]))
    assert ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


def test_a_plainly_greedy_batch_is_a_bare_argmax() -> None:
    state = state_of(request(temperature=0.0, top_k=5, top_p=0.5, min_tokens=2, stop_ids=[1]), request(temperature=0.0))
    batch = state.batch([rows(0, 2), rows(1)])
    assert (batch.additions, batch.penalties, batch.draw) == (None, None, None)


def test_logits_stay_as_they_are() -> None:
    logits = random_logits(1)
    state = state_of(
        request(logit_bias={1: 3.0}, presence_penalty=1.0, top_k=2, min_p=0.1, min_tokens=1, stop_ids=[3], seed=0)
    )
    before = logits.clone()
    state.sample(logits, state.batch([rows(0)]))
    assert torch.equal(logits, before)


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = 1e4 * random_logits(1)[0]
    assert draws(logits, 10, temperature=1e-38)[logits.argmax()] == 10


def test_logit_bias_adds_and_bans() -> None:
    logits = random_logits(2)
    bias = {0: 100.0, 39: 2.5, 5: -1.0}
    state = state_of(request(temperature=0.0, logit_bias=bias), request(temperature=0.0))
    assert state.sample(logits, state.batch([rows(0), rows(1)])).tolist() == [0, int(logits[1].argmax())]
    tilted = logits[0].clone()
    for token, value in {39: 2.5, 5: -100.0}.items():
        tilted[token] += value
    counts = draws(logits[0], 20_000, logit_bias={39: 2.5, 5: -100.0})
    assert_drawn_from(counts, distribution(tilted.numpy()))
    assert counts[5] == 0


def test_stop_ids_are_banned_before_min_tokens() -> None:
    logits = torch.zeros(1, V)
    logits[0, [8, 9]] = torch.tensor([4.0, 5.0])
    state = state_of(request(temperature=0.0, min_tokens=2, stop_ids=[9, 9, 10_000]))
    ids = [state.sample(logits, state.batch([rows(0, index)])).item() for index in range(4)]
    assert ids == [8, 8, 9, 9]


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.4},
        {"frequency_penalty": -0.5, "presence_penalty": 1.5, "repetition_penalty": 1.2},
    ],
)
def test_penalties_count_what_was_generated(penalties: dict[str, float]) -> None:
    """Greedy, many steps: each token from logits that a plain loop over the tokens has penalised."""
    prompt, logits = (1, 2, 2, 30), random_logits(1, seed=8)
    state = state_of(request(temperature=0.0), request(prompt, temperature=0.0, **penalties))
    output: list[int] = []
    for index in range(40):
        expected = logits[0].double().numpy().copy()
        for token in range(V):
            count = output.count(token)
            if token in prompt or count:
                factor = penalties.get("repetition_penalty", 1.0)
                expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
            expected[token] -= penalties.get("frequency_penalty", 0.0) * count
            expected[token] -= penalties.get("presence_penalty", 0.0) * (count > 0)
        ids = state.sample(logits.expand(2, -1), state.batch([rows(1, index), rows(0, index)])).tolist()
        assert ids == [int(expected.argmax()), int(logits.argmax())]
        output.append(ids[0])


def test_a_slot_forgets_the_sequence_before() -> None:
    logits = torch.zeros(1, V)
    logits[0, :3] = torch.tensor([3.0, 2.5, 2.0])
    first = request(prompt=[0], temperature=0.0, repetition_penalty=2.0, presence_penalty=2.0, logit_bias={2: 0.4})
    state = state_of(replace(first, params=replace(first.params, min_tokens=9), stop_ids=(3,)))
    assert [state.sample(logits, state.batch([rows(0, i)])).item() for i in range(2)] == [1, 2]
    plain = request(prompt=[39], temperature=0.0)
    state.add(0, plain)
    assert state.sample(logits, state.batch([rows(0)])).item() == 0
    penalised = request(prompt=[39], temperature=0.0, presence_penalty=0.7)
    state.add(0, penalised)
    assert [state.sample(logits, state.batch([rows(0, i)])).item() for i in range(3)] == [0, 1, 0]
    state.add(0, penalised, generated_ids=[0, 0])
    assert state.sample(logits, state.batch([rows(0, 2)])).item() == 1


def test_log_probabilities_ranks_and_the_likeliest() -> None:
    logits = random_logits(3, seed=2)
    ids = torch.tensor([int(logits[0].argmax()), 5, int(logits[2].argmin())])
    found = token_logprobs(logits, ids, 4).to_host(lambda tensor: tensor).rows()
    for row, values in enumerate(found):
        exact = logits[row].double().numpy()
        exact = exact - math.log(np.exp(exact).sum())
        order = np.argsort(-exact)
        assert values.token_id == ids[row]
        assert values.logprob == pytest.approx(exact[ids[row]], abs=1e-5)
        assert order[values.rank - 1] == ids[row]
        assert [token for token, _ in values.top] == order[:4].tolist()
        assert [value for _, value in values.top] == pytest.approx(exact[order[:4]], abs=1e-5)
    assert token_logprobs(logits, ids, 0).rows()[0].top == ()


def test_a_token_is_counted_up_to_a_limit_and_no_further() -> None:
    often = request(temperature=0.0, frequency_penalty=0.01)
    state = SamplingState(1, V, CPU)
    state.add(0, often, generated_ids=[5] * 40_000)
    logits = torch.zeros(1, V)
    logits[0, 5] = 1000.0
    for _ in range(3):
        assert state.sample(logits, state.batch([rows(0, 0)])).item() == 5
    logits[0, 5] = 100.0
    assert state.sample(logits, state.batch([rows(0, 0)])).item() != 5


def test_large_batches_are_drawn_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7)

    def two_tokens_each() -> list[list[int]]:
        state = state_of(*(request(seed=seed, top_k=9, top_p=0.9, repetition_penalty=1.5 + seed) for seed in range(7)))
        return [state.sample(logits, state.batch([rows(slot, i) for slot in range(7)])).tolist() for i in range(2)]

    whole = two_tokens_each()
    monkeypatch.setattr("neoserve.execution.sampling.DRAW_ELEMENTS", 3 * V)
    assert two_tokens_each() == whole
