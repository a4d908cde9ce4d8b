"""Runs a conversion of a tiny model in this process, on samples of random tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from tgi_cli.kernels.backend import Backend, select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert.calibration import Samples
from tgi_cli.quantize.convert.job import Job, Listener, Outcome, Progress
from tgi_cli.quantize.convert.recipe import Recipe


def samples(count: int, length: int, *, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples(torch.randint(3, 512, (count, length), generator=generator), "random tokens")


def job(
    model: Path,
    output: Path,
    method: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    layout: str | None = None,
    calibrated: bool = True,
    backend: Backend | None = None,
) -> Job:
    return Job(
        open_checkpoint(str(model)),
        Recipe.choose(method, bits, group_size, layout),
        samples(24, 64, seed=1) if calibrated else None,
        samples(4, 48, seed=2),
        backend or select("cpu", num_threads=1),
        output,
    )


def ignore(progress: Progress) -> None:
    """Listen to nothing."""


def convert(made: Job, listener: Listener = ignore, *, resume: bool = False) -> Outcome:
    outcome = made.run(listener, resume=resume)
    made.clean()
    return outcome
