"""The facts of `tgi env`: software, machine, kernels, environment. Only collects, shows nothing.

Everything is plain data, ready for JSON. Secrets are masked here, so that no caller can forget it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tgi_cli import __version__, config
from tgi_cli.cli.launch_flags import SETTINGS
from tgi_cli.engine.cores import cores_by_node, numa_nodes, share_out
from tgi_cli.engine.machine import usable_cores

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "hf-xet",
    "numpy",
    "aiohttp",
    "uvloop",
    "pyzmq",
    "msgspec",
    "triton",
    "flash-attn",
    "bitsandbytes",
)

# What the kernel calls a feature, and what people call it; only those that kernels care about.
_CPU_FEATURES = {
    "sse4_2": "SSE4.2",
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512vl": "AVX-512VL",
    "avx512_vnni": "AVX-512-VNNI",
    "avx512_bf16": "AVX-512-BF16",
    "avx512_fp16": "AVX-512-FP16",
    "amx_tile": "AMX",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "asimdhp": "FP16",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
    "sve2": "SVE2",
}

_PREFIXES = (
    "TGI_",
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "TRITON_",
    "OMP_",
    "KMP_",
    "MKL_",
    "MALLOC_",
    "LD_PRELOAD",
    "XDG_CACHE_HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSW(OR)?D|AUTH\w*|CREDENTIALS?)(_|$)", re.I)
_SECRET_VALUE = re.compile(r"\b(?:hf|sk)[_-][A-Za-z0-9_-]{8,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "***"
#: Modules that ranks run as: those other than 0, and 0.
_RANK, _ENGINE = "tgi_cli.engine.worker", "tgi_cli.engine.process"


def collect() -> dict[str, Any]:
    """All facts, by section. Imports torch; if that fails, the report says why and goes on."""
    return {
        "tgi": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages(),
        "os": {"platform": platform.platform(), "libc": " ".join(platform.libc_ver())},
        "cpu": cpu(),
        "memory": memory(),
        "ranks": ranks(),
        **accelerators(),
        "environment": environment(config.environment()),
    }


def packages() -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model, features, and how many cores there are and may be used."""
    fields: dict[str, str] = {}
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cores(),
        "numa_nodes": list(numa_nodes().values()),
        "cores_of_shards": {
            str(count): [list(own) for own in share_out(cores_by_node(), count)]
            for count in (2, 4, 8)
            if count <= usable_cores()
        },
        "features": [name for flag, name in _CPU_FEATURES.items() if flag in flags],
    }


def memory() -> dict[str, int]:
    """Bytes in all and bytes free, by the machine's count."""
    found = psutil.virtual_memory()  # type: ignore[no-untyped-call]
    return {"total_bytes": int(found.total), "available_bytes": int(found.available)}


def ranks() -> list[dict[str, Any]]:
    """The ranks of divided models that run on this machine now, by the engine they belong to."""
    found: list[dict[str, Any]] = []
    for process in psutil.process_iter():  # type: ignore[no-untyped-call]
        with suppress(psutil.Error, ValueError, IndexError):
            command = process.cmdline()
            if _RANK not in command:
                continue
            rank, parent = int(command[command.index("--rank") + 1]), process.parent()
            if parent is not None and _ENGINE in parent.cmdline():
                found.append(_rank(0, parent.pid, parent))
            found.append(_rank(rank, process.ppid(), process))
    unique = {entry["pid"]: entry for entry in found}
    return sorted(unique.values(), key=lambda entry: (entry["started_by"], entry["rank"]))


def _rank(rank: int, started_by: int, process: psutil.Process) -> dict[str, Any]:
    cores = list(process.cpu_affinity() or [])  # type: ignore[no-untyped-call]
    return {"rank": rank, "pid": process.pid, "started_by": started_by, "cores": cores}


def accelerators() -> dict[str, Any]:
    """The kernels that `--device auto` would use, the memory they may take, and the GPUs."""
    try:
        import torch

        from tgi_cli.kernels import backend, kv_rows
        from tgi_cli.kernels.cpu.huge_pages import huge_pages_setting
    except (ImportError, OSError) as error:  # a broken torch is a reason to run `tgi env`
        return {"kernels": {"error": f"torch cannot be imported: {error}"}, "gpus": []}
    chosen = backend.select("auto")
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "memory_bytes": found.total_memory,
                "compute_capability": f"{found.major}.{found.minor}",
            }
        )
    return {
        "kernels": {
            "backend": chosen.name,
            "device": str(chosen.device),
            "deterministic": chosen.deterministic,
            "kv_cache_dtypes": list(kv_rows.KV_DTYPES),
            "threads": chosen.num_threads,
            "free_bytes": chosen.free_memory(),
            "huge_pages": huge_pages_setting(),
            "cuda": torch.version.cuda,
        },
        "gpus": gpus,
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what tgi does, with secrets masked."""
    own = {name for setting in SETTINGS for names in setting.variables for name in names}
    return {
        name: masked(name, value)
        for name, value in sorted(variables.items())
        if name in own or name.upper().startswith(_PREFIXES)
    }


def masked(name: str, value: str) -> str:
    """`value` without what must not be in a bug report: keys, tokens, logins in addresses."""
    if _SECRET_NAME.search(name):
        return MASK if value else ""
    return _URL_LOGIN.sub(MASK, _SECRET_VALUE.sub(MASK, value))
