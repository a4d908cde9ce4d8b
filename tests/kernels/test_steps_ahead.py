"""Steps that run of their own accord: what they draw and write is what single steps do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_native_step import LOADED, VARIANTS
from tests.unit.runtime.harness import make_request
from tgi_cli.engine.batch_builder import BatchBuilder, BuiltStep
from tgi_cli.engine.rows import TokenHistory
from tgi_cli.engine.sampler import Sampler
from tgi_cli.engine.step import ScheduledRow
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.program import NativeStep
from tgi_cli.kernels.cpu.sampling import NativeSampling
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder

Checkpoints = Callable[..., Path]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]
#: What comes between logits and tokens must be native.
UNCAPPED: dict[str, dict[str, Any]] = {"gemma3": {"final_logit_softcapping": None}}

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


class Rows:
    """A few sequences of one native program, with blocks for 96 tokens each."""

    def __init__(self, path: Path, context: library.Context) -> None:
        backend = select("cpu")
        decoder = Decoder.build(open_checkpoint(str(path)), backend, torch.bfloat16)
        spec = decoder.spec
        self.native = NativeStep(context, decoder)
        self.history = TokenHistory(len(SAMPLINGS), 96, spec.vocab_size)
        self.sampler = Sampler(backend.ops, len(SAMPLINGS), None, self.native.sampling)
        self.builder = BatchBuilder(self.history, len(spec.kv_groups), 16, backend.device)
        self.caches: list[tuple[Tensor, Tensor]] = []
        for layer in spec.layers:
            heads, dim = layer.attention.num_kv_heads, layer.attention.head_dim
            self.caches.append(backend.allocate_kv(20, 16, heads, dim, torch.bfloat16))
        for row, sampling in enumerate(SAMPLINGS):
            request = make_request([5 + row, 6, 7], request_id=str(row), **sampling)
            self.history.add(row, request, ())
            self.sampler.add(row, request, ())
            blocks = [list(range(1 + 6 * row, 7 + 6 * row))] * len(spec.kv_groups)
            self.builder.set_blocks(row, blocks)
        self.starts = [0] * len(SAMPLINGS)
        self.draw(3)

    @property
    def kernel(self) -> NativeSampling:
        kernel = self.sampler.sole_kernel
        assert isinstance(kernel, NativeSampling)
        return kernel

    def build(self, count: int = 1) -> BuiltStep:
        rows = [
            ScheduledRow(row=row, start=start, num_tokens=count, sample=True)
            for row, start in enumerate(self.starts)
        ]
        return self.builder.build(rows)

    def draw(self, count: int = 1) -> list[int]:
        """One step, and its tokens into the history."""
        built = self.build(count)
        logits = torch.empty((len(built.logit_rows), self.history.vocab_size))
        self.native.logits(built.batch, self.caches, logits)
        sampled = self.sampler.sample(logits, built.logit_rows)
        self.take(built, sampled.token_ids)
        self.starts = [start + count for start in self.starts]
        return sampled.token_ids.tolist()

    def take(self, built: BuiltStep, token_ids: np.ndarray) -> None:
        self.history.append_one(built.logit_rows.rows.tolist(), token_ids.tolist())

    def start(self, steps: int) -> BuiltStep:
        built = self.build()
        for group in built.batch.groups:  # the builder lists blocks up to the present one alone
            for row in range(len(SAMPLINGS)):
                group.block_tables[row, :6] = torch.arange(1 + 6 * row, 7 + 6 * row)
        self.native.start_ahead(built.batch, self.caches, self.kernel, built.logit_rows, steps)
        return built


@pytest.fixture(params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoints) -> Path:
    return tiny_checkpoint(request.param, dtype=torch.bfloat16, **UNCAPPED.get(request.param, {}))


@pytest.fixture(params=[1, 2, 4])
def context(request: pytest.FixtureRequest) -> Iterator[library.Context]:
    assert LOADED is not None
    made = LOADED.context(VARIANTS[0], request.param)
    yield made
    made.close()


def test_tokens_and_cache_are_those_of_single_steps(path: Path, context: library.Context) -> None:
    single, ahead = Rows(path, context), Rows(path, context)
    expected = [single.draw() for _ in range(40)]
    steps = ahead.native.ahead
    assert steps is not None
    built = ahead.start(2)
    got = []
    for number in range(40):
        token_ids, valid = steps.finish()
        assert valid.all()
        got.append(token_ids.tolist())
        ahead.take(built, token_ids)
        if number < 39:
            steps.want(min(number + 3, 40))
    assert got == expected
    with pytest.raises(RuntimeError, match="given up"):
        steps.finish()  # it was not wanted
    for (k, v), (own_k, own_v) in zip(single.caches, ahead.caches, strict=True):
        # Of what the program wrote; gaps in rows of a width of their own hold anything.
        assert torch.equal(k.view(torch.int16)[1:], own_k.view(torch.int16)[1:])
        assert torch.equal(v.view(torch.int16)[1:], own_v.view(torch.int16)[1:])


def test_a_guess_that_is_given_up_changes_no_known_token(
    path: Path, context: library.Context
) -> None:
    """Ended at any moment, by `settle` or by another use of the threads, steps go on as before."""
    single, ahead = Rows(path, context), Rows(path, context)
    expected = [single.draw() for _ in range(40)]
    steps = ahead.native.ahead
    assert steps is not None
    got = []
    for number in range(20):
        built = ahead.start(2)
        token_ids, _ = steps.finish()
        got.append(token_ids.tolist())
        ahead.take(built, token_ids)
        ahead.starts = [start + 1 for start in ahead.starts]
        if number % 3 == 0:
            steps.settle()
        got.append(ahead.draw())
    assert got == expected


def test_what_was_not_started_is_not_waited_for(path: Path, context: library.Context) -> None:
    rows = Rows(path, context)
    steps = rows.native.ahead
    assert steps is not None
    rows.start(1)
    steps.finish()
    steps.settle()
    with pytest.raises(RuntimeError, match="given up"):
        steps.finish()


def test_closing_ends_what_runs(path: Path) -> None:
    assert LOADED is not None
    context = LOADED.context(VARIANTS[0], 2)
    rows = Rows(path, context)
    rows.start(2)
    context.close()
    del rows  # its memory goes last
