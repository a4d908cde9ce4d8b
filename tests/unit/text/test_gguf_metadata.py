from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.unit.text.factories import write_gguf
from tgi_cli.errors import CheckpointError, TgiError, UnsupportedModel
from tgi_cli.gguf_metadata import read_gguf_metadata

VALUES = {
    "a.int": 7,
    "a.float": 0.5,
    "a.flag": True,
    "a.text": "grüße 😀",
    "a.strings": ["", "x", "ÿ" * 300],
    "a.floats": [0.25, -1.5],
    "a.ints": [3, -4, 5],
    "a.flags": [True, False],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", VALUES)


def test_every_value_reads_back(path: Path) -> None:
    metadata = read_gguf_metadata(str(path))
    assert {key: metadata[key] for key in VALUES} == VALUES
    assert metadata["general.architecture"] == "llama"
    assert metadata.get("nothing") is None
    assert metadata.array("a.floats").tolist() == VALUES["a.floats"]
    with pytest.raises(CheckpointError, match="lacks the key `nothing`"):
        metadata["nothing"]
    with pytest.raises(CheckpointError, match="no numeric array"):
        metadata.array("a.strings")


def test_agrees_with_the_gguf_package(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    metadata = read_gguf_metadata(str(path))
    assert [key for key in reader.fields if not key.startswith("GGUF.")] == list(metadata)
    assert [entry.name for entry in metadata.tensors] == [t.name for t in reader.tensors]
    entry, tensor = metadata.tensors[0], reader.tensors[0]
    assert (entry.offset, entry.num_bytes) == (tensor.data_offset, tensor.n_bytes)
    assert entry.shape == tuple(reversed(tensor.shape.tolist()))
    raw = path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    values = np.frombuffer(raw, np.float32).reshape(entry.shape)
    assert np.array_equal(values, np.arange(64, dtype=np.float32).reshape(8, 8))


def test_every_truncation_is_reported(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    metadata = read_gguf_metadata(str(path))
    end = metadata.tensors[0].offset + metadata.tensors[0].num_bytes
    for length in range(end):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_gguf_metadata(str(cut))


def test_damaged_bytes_never_raise_anything_else(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    rng = random.Random(5)
    refused = 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        damaged.write_bytes(changed)
        try:
            metadata = read_gguf_metadata(str(damaged))
            for key in metadata:
                metadata[key]
        except TgiError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", CheckpointError, "is empty"),
        (b"<html>not found</html>", CheckpointError, "not a GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(16), UnsupportedModel, "version 1"),
        (b"GGUF\0\0\0\x03" + bytes(16), UnsupportedModel, "big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, CheckpointError, "do not fit"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, error: type[TgiError], message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message):
        read_gguf_metadata(str(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf_metadata(str(tmp_path / "none.gguf"))
    with pytest.raises(CheckpointError, match="directory"):
        read_gguf_metadata(str(tmp_path))


def test_key_given_twice(path: Path) -> None:
    data = path.read_bytes()
    twice = data.replace(b"\x06\0\0\0\0\0\0\0a.ints", b"\x05\0\0\0\0\0\0\0a.int")
    path.write_bytes(twice)
    with pytest.raises(CheckpointError, match=r"`a\.int` occurs twice"):
        read_gguf_metadata(str(path))
