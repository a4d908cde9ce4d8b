"""The sampling kernel against the stages and the noise in torch: the same token in every case.

Each case draws for many rows and seeds, so that one token too many or too few in a nucleus, or one
other bit of noise, would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.runtime.harness import make_request
from tgi_cli.engine.rows import LogitRows, TokenHistory
from tgi_cli.engine.sampler import Sampled, Sampler
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.sampling import NativeSampling

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
ROWS = 12
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top-k": {"top_k": 7},
    "top-k 1": {"top_k": 1},
    "top-k wide": {"top_k": 900},
    "top-k of everything": {"top_k": 10**6},
    "top-p": {"top_p": 0.6, "temperature": 0.5},
    "top-p narrow": {"top_p": 1e-6},
    "top-p wide": {"top_p": 0.97, "temperature": 3.0},
    "top-p of nearly everything": {"top_p": 1 - 1e-9, "temperature": 4.0},
    "top-k and top-p": {"top_k": 40, "top_p": 0.8, "temperature": 2.0},
    "min-p": {"min_p": 0.02},
    "min-p of one": {"min_p": 1.0},
    "all three": {"top_k": 500, "top_p": 0.95, "min_p": 0.001, "temperature": 1.7},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.4},
    "penalties, greedy": {
        "temperature": 0.0,
        "repetition_penalty": 0.6,
        "frequency_penalty": -1.5,
        "presence_penalty": 0.9,
    },
    "typical": {"typical_p": 0.7, "top_k": 100, "repetition_penalty": 1.1},
    "bias": {"logit_bias": {3: 7.5, 40: -100.0}, "top_p": 0.9},
    "minimum": {"min_tokens": 16, "stop_token_ids": (0, 5, 40)},
}

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


@pytest.fixture(scope="module", params=VARIANTS)
def context(request: pytest.FixtureRequest) -> Iterator[library.Context]:
    assert LOADED is not None
    made = LOADED.context(request.param, 2)
    yield made
    made.close()


class Pair:
    """The stages and the kernel, filled with the same rows."""

    def __init__(
        self, context: library.Context, vocab_size: int, rows: list[dict[str, Any]]
    ) -> None:
        ops = select("cpu").ops
        self.history = TokenHistory(len(rows), 96, vocab_size)
        self.oracle = Sampler(ops, len(rows))
        self.fused = Sampler(
            ops, len(rows), fused=lambda parameters: NativeSampling(context, parameters)
        )
        random = np.random.default_rng(vocab_size)
        for row, sampling in enumerate(rows):
            prompt = random.integers(0, vocab_size, 30 + row).tolist()
            outputs = random.integers(0, min(vocab_size, 9), row % 12).tolist()
            seed = int(random.integers(0, 2**63)) * 2 + row % 2
            request = make_request(prompt, **{"seed": seed, "max_tokens": 40, **sampling})
            for state in (self.history, self.oracle, self.fused):
                state.add(row, request, outputs)

    def batch(self, rows: list[int]) -> LogitRows:
        return LogitRows.of(self.history, np.array(rows, np.int64))

    def compare(self, logits: Tensor) -> Sampled:
        batch = self.batch(list(range(len(logits))))
        expected = self.oracle.sample(logits.clone(), batch)
        got = self.fused.sample(logits.clone(), batch)
        assert np.array_equal(got.valid, expected.valid)
        assert np.array_equal(got.token_ids[got.valid], expected.token_ids[got.valid])
        return got


@pytest.mark.parametrize("vocab_size", [41, 64, 1000, 20011])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_draws_what_the_stages_draw(
    case: str, vocab_size: int, context: library.Context
) -> None:
    pair = Pair(context, vocab_size, [CASES[case]] * ROWS)
    generator = torch.Generator().manual_seed(vocab_size)
    for spread in (0.5, 3.0):
        pair.compare(torch.randn((ROWS, vocab_size), generator=generator) * spread)


def test_equal_logits_draw_alike(context: library.Context) -> None:
    """Ties stay or go together, and the lowest id wins what remains of them."""
    for case in CASES.values():
        pair = Pair(context, 1000, [case] * ROWS)
        pair.compare(torch.zeros(ROWS, 1000))
        steps = torch.arange(1000).remainder(5).float().expand(ROWS, -1).clone()
        pair.compare(steps)
        pair.compare(torch.full((ROWS, 1000), -3.0).index_fill_(1, torch.tensor([7, 900]), 2.0))


def test_rows_that_are_not_finite_are_told(context: library.Context) -> None:
    pair = Pair(context, 300, [{}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_tokens": 9}] * 3)
    for place in (0, 63, 299):
        for value in (float("nan"), float("inf")):
            logits = torch.randn((12, 300), generator=torch.Generator().manual_seed(1))
            logits[2:6, place] = value
            assert pair.compare(logits).valid.tolist() == [True] * 2 + [False] * 4 + [True] * 6
    nothing = torch.full((12, 300), float("-inf"))
    assert not pair.compare(nothing).valid.any()
    nothing[:, 123] = -5.0
    assert pair.compare(nothing).token_ids.tolist() == [123] * 12
    overflowing = Pair(context, 300, [{"temperature": 1e-30}])
    assert not overflowing.compare(torch.full((1, 300), 1e20)).valid.any()


def test_neighbours_change_no_draw(context: library.Context) -> None:
    cases = list(CASES.values())
    pair = Pair(context, 5000, cases)
    logits = torch.randn((len(cases), 5000), generator=torch.Generator().manual_seed(2)) * 2
    together = pair.compare(logits).token_ids
    for row in range(len(cases)):
        alone = pair.fused.sample(logits[row : row + 1].clone(), pair.batch([row]))
        assert alone.token_ids.tolist() == [together[row]]
    shuffled = np.random.default_rng(0).permutation(len(cases))
    batch = pair.batch(shuffled.tolist())
    mixed = pair.fused.sample(logits[torch.from_numpy(shuffled)], batch)
    assert np.array_equal(mixed.token_ids, together[shuffled])


def test_drafts_count_as_outputs(context: library.Context) -> None:
    """Rows behind drafts see them in the penalties and draw with the noise of their position."""
    case = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "temperature": 0.8}
    pair = Pair(context, 50, [case] * 3)
    for row in range(3):
        pair.history.propose(row, [4, 5, 6])
    batch = LogitRows.of(pair.history, np.arange(3), np.array([3, 0, 2]))
    logits = torch.randn((len(batch), 50), generator=torch.Generator().manual_seed(3))
    expected = pair.oracle.sample(logits.clone(), batch).token_ids
    assert np.array_equal(pair.fused.sample(logits, batch).token_ids, expected)
