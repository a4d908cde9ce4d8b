"""Real weights: the first layers of the demo model, where methods must differ as they are known to.

Rounding to nearest, by the same code, is the mark to beat.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.quantize.conversion import ignore
from tgi_cli.demo_model import demo_model_path
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.quantize.convert import procedures
from tgi_cli.quantize.convert.calibration import samples_of, shipped_text
from tgi_cli.quantize.convert.job import Job
from tgi_cli.quantize.convert.layer_work import LayerWork
from tgi_cli.quantize.convert.quality import Quality
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.stream import Stream
from tgi_cli.quantize.methods.grid import fit
from tgi_cli.tokenizer import load_tokenizer

LAYERS = 3

pytestmark = pytest.mark.real_model


def nearest_layer(
    work: LayerWork, stream: Stream | None, recipe: Recipe, scale_dtype: torch.dtype
) -> procedures.QuantizedLayer:
    done = procedures.QuantizedLayer({}, {})
    for point in work.points:
        weight = work.weight(point)
        grid = fit(weight, 4, recipe.group_size, symmetric=True, scale_dtype=scale_dtype)
        procedures._store(work, point, grid.nearest(weight), weight, None, done)
    return done


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first layers as a folder, and the file they come from."""
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not in the cache folder; `tgi download demo` puts it there")
    file = open_checkpoint(str(path))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in file.source.keys():  # noqa: SIM118
        place = re.match(r"model\.layers\.(\d+)\.", name)
        if place is not None and int(place[1]) >= LAYERS:
            continue
        tensors[name] = file.source.read(name).float().contiguous()
        if "proj" in name:  # off the file's own 4-bit grid
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] += 0.05 * tensors[name].std() * noise
    folder = tmp_path_factory.mktemp("real") / "beginning"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**file.config, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, path


def quality(beginning: tuple[Path, Path], output: Path, method: str) -> Quality:
    folder, tokenizer_path = beginning
    tokenizer = load_tokenizer(str(tokenizer_path))
    seen, held_out = (
        samples_of(shipped_text(name), name, tokenizer, count=count, length=128)
        for name, count in (("calibration", 24), ("held_out", 4))
    )
    recipe = Recipe.choose(method, group_size=64 if method in ("gptq", "awq") else None)
    backend = select("cpu", num_threads=1)
    job = Job(open_checkpoint(str(folder)), recipe, seen, held_out, backend, output)
    return job.run(ignore).quality


def test_methods_beat_rounding_to_nearest(
    beginning: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        method: quality(beginning, tmp_path / method, method)
        for method in ("gptq", "awq", "int8", "fp8")
    }
    monkeypatch.setitem(procedures.PROCEDURES, "gptq", nearest_layer)
    nearest = quality(beginning, tmp_path / "nearest", "gptq")
    divergences = {name: each.divergence for name, each in found.items()}
    print(divergences, nearest.divergence)
    assert divergences["gptq"] < 0.7 * nearest.divergence
    assert divergences["awq"] < 0.9 * nearest.divergence
    assert divergences["int8"] < 0.2 * nearest.divergence
    assert divergences["fp8"] < 0.5 * nearest.divergence
