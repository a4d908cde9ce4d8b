from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.runtime.harness import VOCAB, Bench, make_request
from tgi_cli.engine.draw import argmax, draw_dense, draw_gumbel
from tgi_cli.engine.logprobs import token_logprobs
from tgi_cli.engine.rows import LogitRows, TokenHistory
from tgi_cli.engine.sampler import Sampler, num_accepted
from tgi_cli.kernels.backend import select
from tgi_cli.sampling import MAX_SEED

DRAWS = 8_000


def logits_of(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def chi_square_limit(degrees: int) -> float:
    """99.99 % quantile by Wilson and Hilferty's approximation; seeds are fixed, so no flakes."""
    a = 2 / (9 * degrees)
    return degrees * (1 - a + 3.719 * math.sqrt(a)) ** 3


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"top_k": 9, "top_p": 0.9, "temperature": 1.3},
        {"repetition_penalty": 1.8},
        {"logit_bias": {4: 3.0}},
    ],
    ids=str,
)
def test_draws_follow_the_processed_distribution(sampling: dict[str, Any]) -> None:
    vocab_size, rows = 12, DRAWS
    history = TokenHistory(rows, 4, vocab_size)
    sampler = Sampler(select("cpu").ops, rows)
    for row in range(rows):
        request = make_request([1, 2], seed=row * 7919 + 1, **sampling)
        history.add(row, request, ())
        sampler.add(row, request, ())
    logits = logits_of(1, vocab_size).expand(rows, -1).clone()
    batch = LogitRows.of(history, np.arange(rows))
    drawn = sampler.sample(logits, batch).token_ids  # `logits` are the processed ones afterwards
    probs = torch.softmax(logits[0].double(), -1).numpy()
    counts = np.bincount(drawn, minlength=vocab_size)
    assert not counts[probs == 0].any()
    kept = probs > 0
    assert kept.sum() > 1
    expected = probs[kept] * rows
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert chi_square < chi_square_limit(int(kept.sum()) - 1)


def test_positions_of_one_request_are_independent_draws(make_bench: Any) -> None:
    bench: Bench = make_bench(max_rows=1, max_len=1700)
    logits = torch.zeros(1, VOCAB)
    drawn = []
    bench.put(0, make_request(seed=3))
    for _ in range(1600):
        token = bench.sample(logits, [0]).token_ids
        bench.history.append_one([0], token.tolist())
        drawn.append(int(token[0]))
    pairs = np.zeros((4, 4))
    for first, second in itertools.pairwise(drawn):
        pairs[first % 4, second % 4] += 1
    expected = pairs.sum() / 16
    assert ((pairs - expected) ** 2 / expected).sum() < chi_square_limit(9)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 12.0])
def test_the_candidate_bound_never_changes_a_draw(scale: float) -> None:
    ops = select("cpu").ops
    logits = logits_of(40, 2000, seed=1) * scale
    logits[::3, 7:] = float("-inf")
    seeds, positions = torch.arange(40) * 10**15, torch.arange(40)
    assert torch.equal(
        draw_gumbel(logits, seeds, positions, ops), draw_dense(logits, seeds, positions, ops)
    )


@pytest.mark.parametrize("vocab_size", [5, 256, 1000, 1024])
def test_argmax_takes_the_lowest_of_equals(vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, -1] = 1.0
    logits[2, [3, vocab_size - 1]] = 2.0
    assert argmax(logits).tolist() == [0, vocab_size - 1, 3]


SAMPLINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.0},
    {"seed": 3, "top_k": 3},
    {"seed": MAX_SEED, "typical_p": 0.7, "repetition_penalty": 1.2},
    {"seed": 2**63, "min_p": 0.2, "frequency_penalty": 0.3},
]


def test_tokens_do_not_depend_on_the_batch(make_bench: Any) -> None:
    """Alone, together, in another order and in another row: the same tokens."""
    requests = [make_request([i + 1, 2], **s) for i, s in enumerate(SAMPLINGS)]
    logits = [logits_of(len(requests), seed=step) for step in range(20)]

    def run(order: list[int], rows: list[int]) -> dict[int, list[int]]:
        bench: Bench = make_bench(max_rows=16)
        for i, row in zip(order, rows, strict=True):
            bench.put(row, requests[i])
        out: dict[int, list[int]] = {i: [] for i in order}
        for step in logits:
            tokens = bench.sample(step[order], rows).token_ids
            bench.history.append_one(rows, tokens.tolist())
            for i, token in zip(order, tokens.tolist(), strict=True):
                out[i].append(token)
        return out

    together = run([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert run([5, 3, 1, 0, 2, 4], [9, 2, 15, 4, 7, 0]) == together
    for i in range(len(requests)):
        assert run([i], [3]) == {i: together[i]}


def test_a_rebuilt_row_goes_on_as_before(make_bench: Any) -> None:
    requests = [make_request([i + 1], **s) for i, s in enumerate(SAMPLINGS)]
    logits = [logits_of(len(requests), seed=100 + step) for step in range(16)]
    results = []
    for rebuild in (False, True):
        bench: Bench = make_bench(max_rows=8)
        outputs: list[list[int]] = [[] for _ in requests]
        for row, request in enumerate(requests):
            bench.put(row, request)
        for i, step in enumerate(logits):
            row = i % len(requests)
            if rebuild:
                bench.take(row)
                full = make_request([row + 1], outputs[row], **SAMPLINGS[row])
                bench.put(row, full)
            tokens = bench.sample(step, range(len(requests))).token_ids
            bench.history.append_one(range(len(requests)), tokens.tolist())
            for output, token in zip(outputs, tokens.tolist(), strict=True):
                output.append(token)
        results.append(outputs)
    assert results[0] == results[1]


def test_drafts_are_accepted_exactly_when_they_would_have_been_drawn(make_bench: Any) -> None:
    """Whatever is proposed, the output is what plain sampling gives."""
    step_logits = logits_of(12, seed=5)  # logits by output position: a toy model

    def draw(bench: Bench, drafts: list[int]) -> list[int]:
        bench.history.propose(0, drafts)
        batch = LogitRows.of(bench.history, np.array([0]), np.array([len(drafts)]))
        drawn = bench.sampler.sample(step_logits[batch.output_positions], batch).token_ids.tolist()
        return drawn[: num_accepted(drafts, drawn) + 1]

    sampling = {"seed": 11, "top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.4}
    plain: Bench = make_bench()
    plain.put(0, make_request(**sampling))
    expected: list[int] = []
    for _ in range(10):
        expected += draw(plain, [])
        plain.history.append(0, expected[-1:])
    drafted: Bench = make_bench()
    drafted.put(0, make_request(**sampling))
    output: list[int] = []
    wrong = (expected[4] + 1) % VOCAB
    for drafts, accepted in (
        (expected[0:3], 3),  # all right
        ([wrong, 1], 0),  # first wrong
        ([expected[5], (expected[6] + 1) % VOCAB], 1),  # second wrong
        ([], 0),
        (expected[8:9], 1),
    ):
        tokens = draw(drafted, drafts)
        assert len(tokens) == accepted + 1
        drafted.history.append(0, tokens)
        output += tokens
    assert output == expected[: len(output)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(
    make_bench: Any, bad: float, temperature: float
) -> None:
    bench: Bench = make_bench()
    for row in range(3):
        bench.put(row, make_request(temperature=temperature, seed=row, top_p=0.9))
    logits = logits_of(3)
    expected = bench.sample(logits, [0, 1, 2]).token_ids
    logits[1, 5] = bad
    sampled = bench.sample(logits, [0, 1, 2])
    assert sampled.valid.tolist() == [True, False, True]
    assert sampled.token_ids[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_nothing_allowed_is_not_a_token(make_bench: Any) -> None:
    bench: Bench = make_bench(vocab_size=4)
    bench.put(0, make_request([1], min_tokens=1, stop_token_ids=(0, 1, 2, 3)))
    assert not bench.sample(torch.zeros(1, 4), [0]).valid[0]


def test_logprobs_are_of_the_raw_distribution(make_bench: Any) -> None:
    bench: Bench = make_bench()
    bench.put(0, make_request(temperature=0.0, logprobs=3, logit_bias={9: 100.0}))
    bench.put(1, make_request(temperature=0.0))
    bench.put(2, make_request(seed=4, temperature=5.0, top_k=40, logprobs=0))
    logits = logits_of(3)
    sampled = bench.sample(logits, [0, 1, 2])
    raw = torch.log_softmax(logits, -1)
    assert sorted(sampled.logprobs) == [0, 2]
    biased = sampled.logprobs[0]
    best = raw[0].sort(descending=True)
    assert biased.token_id == 9
    assert biased.logprob == pytest.approx(float(raw[0, 9]))
    assert biased.rank == best.indices.tolist().index(9) + 1
    assert biased.top_ids == best.indices[:3].tolist()
    assert biased.top_logprobs == pytest.approx(best.values[:3].tolist())
    assert sampled.logprobs[2].token_id == sampled.token_ids[2]
    assert sampled.logprobs[2].top_ids == []


def test_equal_alternatives_are_ordered_by_id() -> None:
    logits = torch.zeros(2, 600)
    logits[0, 300] = 1.0
    logits[1, [5, 599]] = -1.0
    for count in (1, 3, 8):
        first, second = token_logprobs(logits, [300, 5], [count, count])
        assert first.top_ids == [300, *range(count - 1)]
        assert second.top_ids == [0, 1, 2, 3, 4, 6, 7, 8][:count]
        assert second.rank == 599
