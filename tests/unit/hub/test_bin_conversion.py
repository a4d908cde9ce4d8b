"""Pickled weights become safetensors, equal to the last bit, once."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.hub_server.server import File, Hub, Repo
from tests.unit.hub.conftest import Client, text
from tgi_cli.errors import CheckpointError
from tgi_cli.hub import resolve
from tgi_cli.hub_conversion import MARKER, convert_pickles
from tgi_cli.hub_transfer import Progress
from tgi_cli.model.bin_conversion import convert


def ignore(*_report: object) -> None:
    """Listen to nothing."""


def tied_state() -> dict[str, Tensor]:
    """Every dtype that weights come in, ties, views of one storage, odd values and shapes."""
    torch.manual_seed(0)
    embedding = torch.randn(8, 4)
    packed = torch.randn(6, 4)
    return {
        "model.embed_tokens.weight": embedding,
        "model.query.weight": packed[:2],
        "model.key.weight": packed[2:],
        "model.transposed.weight": torch.randn(3, 5).T,
        "model.half.weight": torch.randn(3, 3).half(),
        "model.bfloat16.weight": torch.tensor([float("nan"), float("inf"), -0.0]).bfloat16(),
        "model.fp8.weight": torch.randn(4).to(torch.float8_e4m3fn),
        "model.mask": torch.tensor([True, False]),
        "model.steps": torch.tensor(7),
        "model.empty": torch.empty(0, 4),
        "model.empty_too": torch.empty(0, 4),
        "lm_head.weight": embedding,
    }


def same(left: Tensor, right: Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def test_every_tensor_survives_and_ties_are_stored_once(tmp_path: Path) -> None:
    state = tied_state()
    torch.save(state, tmp_path / "pytorch_model.bin")
    seen: list[tuple[str, int, int]] = []
    written = convert(tmp_path, ["pytorch_model.bin"], lambda *report: seen.append(report))
    assert written == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert set(state) - set(stored) == {"lm_head.weight"}, "the embedding's name is kept"
    assert all(same(stored[name], state[name]) for name in stored)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    assert seen[0] == ("pytorch_model.bin", 0, size)
    assert seen[-1] == ("pytorch_model.bin", size, size)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors",
        "pytorch_model.bin",
    ]


def test_shards_and_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    first, second = {"a": torch.ones(2, 2)}, {"b": torch.zeros(3)}
    torch.save(first, tmp_path / names[0])
    torch.save({"state_dict": second}, tmp_path / names[1])
    written = convert(tmp_path, names, ignore)
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(written) == [*parts, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 28},
        "weight_map": {"a": parts[0], "b": parts[1]},
    }
    assert same(load_file(tmp_path / parts[1])["b"], second["b"])


def test_files_from_before_zip_archives(tmp_path: Path) -> None:
    state = {"a": torch.arange(4.0)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path, ["pytorch_model.bin"], ignore)
    assert same(load_file(tmp_path / "model.safetensors")["a"], state["a"])


class Mischief:
    """Unpickled carelessly, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as plain tensors"),
        (b"not a pickle", "cannot be read as plain tensors"),
        ({"weights": [1, 2]}, "'weights' is a list, no tensor"),
        ({}, "holds no tensors by name"),
        ([torch.ones(1)], "holds no tensors by name"),
    ],
)
def test_what_is_not_tensors_is_refused(tmp_path: Path, content: object, said: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, ["pytorch_model.bin"], ignore)
    assert caught.value.message.startswith("pytorch_model.bin")
    assert said in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Mischief(tmp_path / "harm"), protocol=2))
    torch.save({"a": Mischief(tmp_path / "harm")}, tmp_path / "zipped.bin")
    for name in ("plain.bin", "zipped.bin"):
        with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
            convert(tmp_path, [name], ignore)
    assert not (tmp_path / "harm").exists()


def test_truncated_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        convert(tmp_path, ["pytorch_model.bin"], ignore)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("one.bin", "two.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in two\.bin and in an earlier file"):
        convert(tmp_path, ["one.bin", "two.bin"], ignore)


def test_converted_once_in_a_process_of_its_own(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    seen: list[Progress] = []
    convert_pickles(tmp_path, ["pytorch_model.bin"], seen.append)
    assert {report.stage for report in seen} == {"convert"}
    assert seen[-1].done == seen[-1].total > 0
    made = (tmp_path / "model.safetensors").stat().st_mtime_ns
    convert_pickles(tmp_path, ["pytorch_model.bin"], seen.append)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == made
    (tmp_path / MARKER).write_text("{")
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as plain"):
        convert_pickles(tmp_path, ["pytorch_model.bin"], seen.append)


def test_local_folder_of_pickles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert resolve(str(tmp_path)) == tmp_path
    assert (tmp_path / "model.safetensors").exists()


def test_repository_of_pickles(hub: Hub, client: Client, tmp_path: Path) -> None:
    torch.save(tied_state(), tmp_path / "made.bin")
    data = (tmp_path / "made.bin").read_bytes()
    files = {"config.json": text(), "pytorch_model.bin": File(data, lfs=True)}
    hub.repos["org/old"] = Repo(files)
    outcome = client.download("org/old")
    assert outcome.names == {"config.json", "pytorch_model.bin"}
    assert "converted pytorch_model.bin" in outcome.err
    stored = load_file(Path(outcome.report["path"]) / "model.safetensors")
    assert len(stored) == len(tied_state()) - 1
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = client.download("org/old", **variables)
        assert again.report["path"] == outcome.report["path"]
        assert "converted" not in again.err
