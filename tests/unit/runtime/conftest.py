from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.unit.runtime.harness import VOCAB, Bench
from tgi_cli.engine.rows import TokenHistory
from tgi_cli.engine.sampler import Sampler
from tgi_cli.kernels.backend import select


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    def make(max_rows: int = 8, vocab_size: int = VOCAB, max_len: int = 64) -> Bench:
        ops = select("cpu").ops
        return Bench(Sampler(ops, max_rows), TokenHistory(max_rows, max_len, vocab_size))

    return make
