from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tgi_cli.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.machine import usable_cores
from tgi_cli.engine.memory_plan import MemoryPlan, check_config, plan, plan_for
from tgi_cli.engine.precision import resolve_dtype
from tgi_cli.errors import OutOfMemory, UsageError
from tgi_cli.kernels.backend import Backend, select
from tgi_cli.model.checkpoint import open_checkpoint

GB = 10**9


def with_free(free: int, device: torch.device | None = None) -> Backend:
    """A backend that says so much is free; everything else is the real one."""

    class Limited(Backend):
        __slots__ = ()

        def free_memory(self, ranks: int = 1) -> int:
            return free

    real = select("cpu")
    return Limited(
        name=real.name,
        device=device or real.device,
        ops=real.ops,
        deterministic=real.deterministic,
        num_threads=real.num_threads,
    )


def planned(
    path: Path, free: int = 8 * GB, *, device: torch.device | None = None, **options: Any
) -> MemoryPlan:
    sections: dict[str, dict[str, Any]] = {"model": {"model_id": str(path)}}
    for name, value in options.items():
        section = {
            "max_model_len": "model", "dtype": "model", "kv_cache_tokens": "cache",
            "kv_cache_dtype": "cache",
            "block_size": "cache", "max_num_seqs": "scheduler", "max_batch_tokens": "scheduler",
        }[name]  # fmt: skip
        sections.setdefault(section, {})[name] = value
    config = EngineConfig(
        model=ModelConfig(**sections["model"]),
        cache=CacheConfig(**sections.get("cache", {})),
        scheduler=SchedulerConfig(**sections.get("scheduler", {})),
    )
    return plan(open_checkpoint(str(path)), config, with_free(free, device))


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def gemma(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("gemma3", max_position_embeddings=4096)


def test_another_device_holds_the_scores_of_a_prompt(llama: Path) -> None:
    """Four times its scores; keys and values repeated for each of four heads."""
    sizes = {"max_num_seqs": 1, "max_batch_tokens": 128, "max_model_len": 512}
    here, there = (
        planned(llama, device=device, **sizes) for device in (None, torch.device("meta"))
    )
    scores = 4 * (4 * 4 * 128 * 512 + 2 * 4 * 16 * 512)
    assert scores < there.activation_bytes <= here.activation_bytes + scores
    assert there.kv_bytes == here.kv_bytes


def test_enough_memory_holds_every_sequence(llama: Path) -> None:
    result = planned(llama, max_num_seqs=7)
    assert result.max_model_len == 512
    assert result.kv_cache_tokens == 7 * 512
    [group] = result.groups
    assert group.num_blocks == 7 * 512 // 16 + 1  # and the null block
    # two layers, keys and values, 2 heads of 16, float32
    assert group.block_bytes == 2 * 2 * 2 * 16 * 4 * 16
    assert result.fits
    result.check()


def test_plan_and_tensors_agree(gemma: Path) -> None:
    result = planned(gemma, max_num_seqs=3, max_model_len=600)
    backend, checkpoint = select("cpu"), open_checkpoint(str(gemma))
    assert KVCache(backend, checkpoint.spec, result).nbytes == result.kv_bytes


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("auto", 64), ("bfloat16", 32), ("float16", 32), ("float32", 64),
        ("int8", 20), ("fp8", 20), ("fp8_e4m3fn", 20), ("fp8_e5m2", 20),
    ],
)  # fmt: skip
def test_every_form_of_the_cache_is_counted(llama: Path, name: str, row: int) -> None:
    """Heads of 16: in 8 bits 16 codes and a scale of 4 bytes."""
    result = planned(llama, kv_cache_dtype=name, kv_cache_tokens=512)
    [group] = result.groups
    assert group.block_bytes == 2 * 2 * 2 * 16 * row
    backend, checkpoint = select("cpu"), open_checkpoint(str(llama))
    cache = KVCache(backend, checkpoint.spec, result)
    assert cache.nbytes == result.kv_bytes
    assert result.as_dict()["kv_cache_dtype"] == {
        "auto": "float32", "fp8": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3"
    }.get(name, name)  # fmt: skip


def test_little_memory_shrinks_pool_and_context(llama: Path) -> None:
    roomy = planned(llama)
    free = roomy.weights_bytes + roomy.activation_bytes + 4_000_000
    tight = planned(llama, free=2 * free)
    assert tight.kv_cache_tokens < roomy.kv_cache_tokens
    assert tight.kv_bytes + tight.activation_bytes <= (2 * free - tight.weights_bytes) / 2
    assert tight.fits


def test_a_pool_smaller_than_the_context_shortens_it_unless_asked_for(llama: Path) -> None:
    assert planned(llama, kv_cache_tokens=300, block_size=4).max_model_len == 300
    with pytest.raises(UsageError, match="300 tokens, less than one context of 512"):
        planned(llama, kv_cache_tokens=300, max_model_len=512)


def test_told_tokens_are_kept_and_counted(llama: Path) -> None:
    result = planned(llama, kv_cache_tokens=100_000, free=50_000_000)
    assert result.kv_cache_tokens == 100_000
    assert not result.fits
    with pytest.raises(OutOfMemory) as caught:
        result.check()
    assert "100,000 tokens" in caught.value.message
    assert "50.0 MB are free" in caught.value.message
    assert "KV cache" in (caught.value.hint or "")


def test_weights_alone_may_be_too_much(llama: Path) -> None:
    result = planned(llama, free=100_000)
    with pytest.raises(OutOfMemory) as caught:
        result.check()
    assert "smaller or quantized model" in (caught.value.hint or "")


def test_a_context_longer_than_the_model_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="made for 512"):
        planned(llama, max_model_len=513)


def test_window_groups_hold_windows_not_contexts(gemma: Path) -> None:
    result = planned(gemma, max_num_seqs=4, max_batch_tokens=32, block_size=4)
    by_window = {group.window: group for group in result.groups}
    assert by_window[None].num_blocks == 4 * 4096 // 4 + 1
    assert by_window[10].num_blocks < 40
    # A chunk as long as the budget fits beside a window.
    assert (by_window[10].num_blocks - 1) * 4 >= 10 + 32
    # Never more than the full context would need.
    small = planned(gemma, max_num_seqs=1, max_model_len=8, block_size=4)
    assert len({group.num_blocks for group in small.groups}) == 1


def test_a_lower_limit_of_the_process_counts(tiny_checkpoint: Callable[..., Path]) -> None:
    half = planned(tiny_checkpoint("llama"), free=4 * GB)
    assert half.free_bytes == 4 * GB
    assert half.as_dict()["free_bytes"] == 4 * GB


def test_as_dict_is_plain_and_complete(gemma: Path) -> None:
    result = planned(gemma)
    data = msgspec.json.decode(msgspec.json.encode(result.as_dict()))
    assert data["dtype"] == "float32"
    assert data["total_bytes"] == data["baseline_bytes"] + data["needed_bytes"]
    assert data["kv_bytes"] == sum(group["bytes"] for group in data["kv_groups"])
    assert data["fits"] is True


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", torch.float64, "cpu", torch.float32),
        ("float16", torch.float32, "cpu", torch.float16),
    ],
)
def test_dtype(name: str, stored: torch.dtype, device: str, expected: torch.dtype) -> None:
    assert resolve_dtype(name, stored, torch.device(device)) == expected


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="`int3`"):
        resolve_dtype("int3", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(model=ModelConfig(model_id="m", quantize="exl2")), "EXL2 .* reads"),
        (
            EngineConfig(
                model=ModelConfig(model_id="m"), parallel=ParallelConfig(num_shard=3, nnodes=2)
            ),
            "3 shards do not divide over 2 nodes",
        ),
        (
            EngineConfig(
                model=ModelConfig(model_id="m"),
                parallel=ParallelConfig(num_shard=2, nnodes=2, node_rank=2),
            ),
            "--node-rank 2 is not one of 2 nodes",
        ),
        (
            EngineConfig(
                model=ModelConfig(model_id="m"), cache=CacheConfig(kv_cache_dtype="nvfp4")
            ),
            "the KV cache cannot be held in `nvfp4`",
        ),
    ],
)
def test_what_cannot_be_done_yet_is_refused(config: EngineConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_config(config)


def test_plan_for_a_local_folder(llama: Path) -> None:
    config = EngineConfig(model=ModelConfig(model_id=str(llama), device="cpu"))
    result = plan_for(config)
    assert result.free_bytes > 0
    assert replace(result, free_bytes=0).fits is False


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_usable_cores(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    everything = usable_cores(tmp_path / "nowhere")
    assert usable_cores(tmp_path) == (expected or everything)


def test_weights_that_are_kept_are_not_counted_twice(llama: Path) -> None:
    """An engine that finds its weights in memory plans as the one that put them there."""
    config = EngineConfig(model=ModelConfig(model_id=str(llama), dtype="float32"))
    checkpoint, free = open_checkpoint(str(llama)), 20_000_000
    first = plan(checkpoint, config, with_free(free))
    kept = first.weights_bytes
    again = plan(checkpoint, config, with_free(free - kept), kept=kept)
    assert again.groups == first.groups
    assert again.free_bytes == free
    assert plan(checkpoint, config, with_free(free - kept)).groups != first.groups
