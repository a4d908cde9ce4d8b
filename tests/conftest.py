"""Fixtures of all areas: reproducible Hypothesis, one thread, tiny checkpoints made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples everywhere; deadlines would time a shared machine.
settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, **options)`: the folder of a checkpoint, made once a session.

    Options are those of `tests.tiny.make_checkpoint`. The folder is shared: copy it to change it.
    """
    import torch

    from tests.tiny import make_checkpoint

    torch.set_num_threads(1)
    made: dict[str, Path] = {}

    def checkpoint(family: str, **options: object) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = make_checkpoint(folder, family, **options)
        return made[key]

    return checkpoint
