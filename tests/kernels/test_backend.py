"""Choosing a backend, its facts and what it allocates."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace

import psutil
import pytest
import torch

from tgi_cli.errors import UsageError
from tgi_cli.kernels import reference
from tgi_cli.kernels.backend import OP_NAMES, Backend, merge, select
from tgi_cli.kernels.cpu.library import load


def test_reference_has_every_operation() -> None:
    assert set(OP_NAMES) == set(reference.__all__)


def test_later_tables_override_and_gaps_are_refused() -> None:
    marker = object()
    ops = merge(vars(reference), {"silu_mul": marker, "unrelated": 1})
    assert ops.silu_mul is marker
    assert ops.rms_norm is reference.rms_norm
    assert not hasattr(ops, "unrelated")
    with pytest.raises(ValueError, match="rms_norm"):
        merge({"silu_mul": marker})


def test_cpu_backend_tells_the_truth(backend: Backend) -> None:
    assert backend.device.type == "cpu"
    assert backend.deterministic == (backend.native is not None)
    assert backend.num_threads == torch.get_num_threads() == 1
    assert backend.plan(object(), 16) is None
    assert 0 < backend.free_memory() <= psutil.virtual_memory().available * 1.1


def test_kv_of_a_layer(backend: Backend) -> None:
    k_cache, v_cache = backend.allocate_kv(3, 4, 2, 8, torch.bfloat16)
    assert k_cache.shape == v_cache.shape == (3, 4, 2, 8)
    assert k_cache.dtype == v_cache.dtype == torch.bfloat16
    assert k_cache.data_ptr() != v_cache.data_ptr()
    assert not k_cache.any()


def test_matrices_stay_in_main_memory_on_a_cpu(backend: Backend) -> None:
    assert backend.weight_buffer(2, 3, torch.bfloat16) is None


def test_matrices_move_to_another_device(backend: Backend) -> None:
    elsewhere = replace(backend, device=torch.device("meta"))
    buffer = elsewhere.weight_buffer(2, 3, torch.bfloat16)
    assert buffer is not None
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((2, 3), torch.bfloat16, "meta")


def test_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown device `tpu`"):
        select("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="device `cuda` is not available") as raised:
        select("cuda")
    assert raised.value.hint


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="no x86-64 machine with a C++ compiler",
)
def test_the_native_kernels_are_built() -> None:
    """Where they can be: without this, every test of theirs would be skipped in silence."""
    library = load()
    assert library is not None
    assert library.variants()
