"""A run that is killed goes on where it was and writes the same bytes; one of another kind refuses.

The killed run is a real process and gets SIGKILL, after random layers and in the middle of writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.quantize.conversion import convert, ignore, job
from tgi_cli.errors import CheckpointError, UsageError
from tgi_cli.quantize.convert.job import Job, Progress
from tgi_cli.quantize.convert.state import WORK_FOLDER

LAYERS = 6
SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.quantize.conversion import convert, job
torch.set_num_threads(1)
model, output = map(Path, sys.argv[1:])
made = job(model, output, "gptq", group_size=32)
convert(made, lambda progress: print(progress.layer, flush=True), resume=True)
"""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert(gptq(model, folder))
    return folder


def gptq(model: Path, folder: Path) -> Job:
    return job(model, folder, "gptq", group_size=32)


class Interrupted(Exception):
    """Stands for the end of a process between two layers."""


def stop_after(layer: int) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if progress.layer == layer:
            raise Interrupted

    return listen


def assert_same(folder: Path, whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_killed_again_and_again(model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(model), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 2 * kills and kills < 3:
                time.sleep(0.02 * attempt)  # somewhere in the next layer
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.stdout.close()
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not (folder / "config.json").exists()
    assert kills == 3
    assert_same(folder, whole)


@pytest.mark.parametrize("layer", [1, LAYERS])
def test_what_a_kill_left_half_written_is_written_anew(
    model: Path, whole: Path, tmp_path: Path, layer: int
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        gptq(model, folder).run(stop_after(layer))
    work = folder / WORK_FOLDER
    for name in (f"layer-{layer:05d}.partial", "calibration-00002.partial", "state.json.partial"):
        (work / name).write_bytes(b"half")
    (folder / "model.partial").write_bytes(b"half")
    if layer < LAYERS:  # a layer may be there without the state that says so
        (work / f"layer-{layer:05d}.safetensors").write_bytes(b"from before")
    assert len(convert_rest(model, folder, layer)) == 7 * LAYERS
    assert_same(folder, whole)


def convert_rest(model: Path, folder: Path, layer: int) -> dict[str, float]:
    seen: list[Progress] = []
    outcome = convert(gptq(model, folder), seen.append, resume=True)
    assert seen[0].resumed
    assert [progress.layer for progress in seen] == list(range(layer, LAYERS + 1))
    return outcome.errors


def test_it_is_not_resumed_unasked(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        gptq(model, folder).run(stop_after(2))
    with pytest.raises(UsageError, match="unfinished run with 2 layers done") as caught:
        gptq(model, folder).run(ignore)
    assert "--resume" in str(caught.value.hint)


def test_another_recipe_or_model_is_refused(
    model: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        gptq(model, folder).run(stop_after(1))
    with pytest.raises(UsageError, match="has another recipe"):
        job(model, folder, "gptq", group_size=32, bits=8).run(ignore, resume=True)
    other = tiny_checkpoint("llama", num_hidden_layers=LAYERS, seed=7)
    with pytest.raises(UsageError, match="has another model"):
        gptq(other, folder).run(ignore, resume=True)


@pytest.mark.parametrize("damage", ["state", "stream"])
def test_a_damaged_run_is_refused(model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        gptq(model, folder).run(stop_after(1))
    work = folder / WORK_FOLDER
    path = work / "state.json" if damage == "state" else next(work.glob("calibration*.states"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=path.name) as caught:
        gptq(model, folder).run(ignore, resume=True)
    assert "start again" in str(caught.value.hint)


def test_an_output_in_use_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        gptq(model, tmp_path).run(ignore)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert json.loads((model / "config.json").read_text())
