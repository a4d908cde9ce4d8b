"""The operations under test: the plain-torch reference, on its own threads."""

from __future__ import annotations

import pytest

from tgi_cli.kernels.backend import Backend, select


@pytest.fixture(scope="session", params=["cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return select(request.param, num_threads=1)
