"""Safetensors folders: single files, shards, slices, and every way they can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tgi_cli.errors import CheckpointError
from tgi_cli.model.weights import BITS, INDEX_FILE, SINGLE_FILE, SafetensorsSource
from tgi_cli.quantize.formats.base import Shard

TENSORS = {
    "embed.weight": torch.arange(48, dtype=torch.bfloat16).view(12, 4),
    "layer.weight": torch.arange(96, dtype=torch.float32).view(8, 12),
    "layer.bias": torch.arange(8, dtype=torch.float16),
    "scale": torch.tensor(3.0),
}
SHARDS = {
    "model-00001-of-00002.safetensors": ("embed.weight", "scale"),
    "model-00002-of-00002.safetensors": ("layer.weight", "layer.bias"),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    weight_map = {}
    for name, keys in SHARDS.items():
        save_file({key: TENSORS[key] for key in keys}, tmp_path / name)
        weight_map |= dict.fromkeys(keys, name)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.fixture(params=["single", "sharded"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_headers_and_values(folder: Path) -> None:
    source = SafetensorsSource(folder)
    assert set(source.keys()) == set(TENSORS)
    assert len(source) == len(TENSORS)
    assert source.stored_dtype("embed.weight") == "BF16"
    for key, expected in TENSORS.items():
        assert key in source
        assert source.shape(key) == tuple(expected.shape)
        assert source.nbytes(key) == expected.numel() * expected.element_size()
        found = source.read(key)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("key", "dim"), [("layer.weight", 0), ("layer.weight", 1), ("layer.bias", 0)]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_concatenate_to_the_whole(key: str, dim: int, world_size: int, folder: Path) -> None:
    source = SafetensorsSource(folder)
    parts = [source.read(key, Shard(dim, rank, world_size)) for rank in range(world_size)]
    assert {part.shape[dim] for part in parts} == {TENSORS[key].shape[dim] // world_size}
    assert torch.equal(torch.cat(parts, dim), TENSORS[key])


def test_missing_tensor_is_named(single: Path) -> None:
    source = SafetensorsSource(single)
    assert "lm_head.weight" not in source
    for call in (source.read, source.shape, source.nbytes):
        with pytest.raises(CheckpointError, match=r"`lm_head\.weight` is missing"):
            call("lm_head.weight")


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*\(1 of 2 files") as raised:
        SafetensorsSource(sharded)
    assert "tgi download" in str(raised.value.hint)


def test_tensor_promised_by_the_index_but_not_stored(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"`extra\.weight` is not in `model-00001"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\udce9"]
)
def test_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 3])
def test_index_may_not_point_out_of_its_folder(name: object, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        SafetensorsSource(sharded)


def test_truncated_file_says_how_long_it_is(single: Path) -> None:
    whole = (single / SINGLE_FILE).read_bytes()
    for size in (0, 4, 20, 200, len(whole) - 1):
        (single / SINGLE_FILE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"truncated.*\({size} bytes\)"):
            SafetensorsSource(single)


def test_corrupt_header(single: Path) -> None:
    whole = bytearray((single / SINGLE_FILE).read_bytes())
    whole[8:12] = b"\xff\xff\xff\xff"
    (single / SINGLE_FILE).write_bytes(whole)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        SafetensorsSource(single)


def test_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer") as raised:
        SafetensorsSource(tmp_path)
    assert "git lfs pull" in str(raised.value.hint)


def test_folders_without_safetensors_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        SafetensorsSource(tmp_path)
    (tmp_path / "m.Q4_1.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF") as raised:
        SafetensorsSource(tmp_path)
    assert "m.Q4_1.gguf" in str(raised.value.hint)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match="pickle") as raised:
        SafetensorsSource(tmp_path)
    assert "tgi download" in str(raised.value.hint)
    with pytest.raises(CheckpointError, match="is no folder"):
        SafetensorsSource(tmp_path / "nowhere")


def test_sizes_are_known_for_every_dtype_torch_can_save(tmp_path: Path) -> None:
    dtypes = {
        str(dtype): torch.zeros(4, 8).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    save_file(dtypes, tmp_path / SINGLE_FILE)
    source = SafetensorsSource(tmp_path)
    for key, tensor in dtypes.items():
        assert source.stored_dtype(key) in BITS
        assert source.nbytes(key) == tensor.numel() * tensor.element_size()
