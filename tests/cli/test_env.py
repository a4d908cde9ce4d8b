"""`tgi env`: the facts of a bug report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tgi_cli.cli import env_report

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "API_KEY": "open sesame",
    "NGROK_AUTHTOKEN": "abc",
    "HTTPS_PROXY": "http://user:pass@proxy:3128",
    "TGI_MODEL_ID": "org/model",
    "MAX_INPUT_TOKENS": "128",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "UNRELATED": "private",
}


def env(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tgi_cli", "env", *arguments],
        env=os.environ | SECRETS,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.stdout


def test_json_report() -> None:
    text = env("--json")
    report = json.loads(text)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["flash-attn"] is None or report["packages"]["flash-attn"]
    assert 1 <= report["cpu"]["usable_cores"] <= report["cpu"]["cores"]
    for count, shares in report["cpu"]["cores_of_shards"].items():
        assert len(shares) == int(count)
        assert len({core for share in shares for core in share}) == sum(map(len, shares))
    assert 0 < report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]
    assert report["kernels"]["deterministic"] in (True, False)
    assert report["kernels"]["threads"] >= 1
    assert len(report["gpus"]) == torch.cuda.device_count()
    variables = report["environment"]
    assert variables["MAX_INPUT_TOKENS"] == "128"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables["TGI_MODEL_ID"] == "org/model"
    assert variables["HTTPS_PROXY"] == "http://***@proxy:3128"
    assert variables["HF_TOKEN"] == variables["API_KEY"] == "***"
    assert "UNRELATED" not in variables
    for secret in ("hf_abcdefghijklmnop", "open sesame", "user:pass", "private"):
        assert secret not in text


def test_text_report() -> None:
    lines = env().splitlines()
    names = [line.split("  ")[0].strip() for line in lines]
    for name in ("tgi", "python", "torch", "cpu features", "cores", "kernels", "deterministic"):
        assert names.count(name) == 1
    assert "HF_TOKEN" in names
    assert "hf_abc" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        (
            "processor : 0\nmodel name\t: Big CPU\nflags\t\t: fpu avx2 fma avx512f avx512_vnni"
            " avx512_bf16 amx_tile amx_int8\n",
            "Big CPU",
            ["AVX2", "FMA", "AVX-512F", "AVX-512-VNNI", "AVX-512-BF16", "AMX", "AMX-INT8"],
        ),
        (
            "processor : 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n",
            None,
            ["NEON", "DOTPROD", "I8MM", "BF16", "SVE"],
        ),
    ],
)
def test_cpu_features(tmp_path: Path, text: str, model: str | None, features: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    facts = env_report.cpu(tmp_path / "cpuinfo")
    assert facts["features"] == features
    assert facts["model"] == model or model is None
    assert env_report.cpu(tmp_path / "missing")["features"] == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("HF_TOKEN", "hf_x", "***"),
        ("HF_TOKEN", "", ""),
        ("HUGGING_FACE_HUB_TOKEN", "x", "***"),
        ("TGI_API_KEY", "x", "***"),
        ("HF_ENDPOINT", "https://me:secret@mirror/x", "https://***@mirror/x"),
        ("HF_ENDPOINT", "https://mirror/x", "https://mirror/x"),
        ("TGI_CHAT_TEMPLATE", "say hf_abcdefghijkl", "say ***"),
        ("MAX_TOTAL_TOKENS", "4096", "4096"),
    ],
)
def test_masking(name: str, value: str, shown: str) -> None:
    assert env_report.masked(name, value) == shown


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = env_report.accelerators()
    assert facts["gpus"] == []
    assert "torch cannot be imported" in facts["kernels"]["error"]
