"""Tests that need a GPU: `pytest tests/cuda -m cuda`. Without one they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tgi_cli.kernels.backend import Backend, select

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            item.add_marker(missing)


@pytest.fixture(scope="session")
def gpu() -> Backend:
    return select("cuda", num_threads=1)


@pytest.fixture(scope="session")
def cpu() -> Backend:
    return select("cpu", num_threads=1)
