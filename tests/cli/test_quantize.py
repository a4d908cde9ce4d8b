"""`tgi quantize` from the outside: the report, and refusals in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tgi_cli.cli.app import load_command
from tgi_cli.cli.console import Invocation


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", "quantize", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def call(*arguments: object) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        load_command("quantize").main([str(each) for each in arguments], obj=Invocation())
    return int(str(ended.value.code))


def test_gptq_with_the_package_s_text(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = run(
        tiny_checkpoint("llama"), out, "--method", "gptq", "--group-size", 32,
        "--samples", 8, "--seqlen", 64, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes_after"] < 0.65 * report["bytes_before"]
    assert report["perplexity_after"] > 0
    assert 0 < report["kl_divergence"] < 1
    assert 0.3 < report["top1_agreement"] < 1
    assert len(report["errors"]) == 14
    assert report["calibration"] == "the calibration text of the package (8 x 64 tokens)"
    assert {verdict["loader"] for verdict in report["verification"]} >= {"tgi", "gptqmodel"}
    card = (out / "README.md").read_text()
    assert f"{report['kl_divergence']:.4f}" in card
    assert "layer 1 of 2" in done.stderr
    assert "of memory and" in done.stderr
    assert call(tiny_checkpoint("llama"), out, "--method", "fp8", "--seqlen", 64) == 2
    assert "exists and holds other things" in " ".join(capsys.readouterr().err.split())


def test_a_text_of_the_user(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.jsonl"
    lines = ["The server takes a prompt and gives an answer. " * 20] * 10
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    out = tmp_path / "out"
    code = call(
        tiny_checkpoint("llama"), out, "--method", "gptq", "--group-size", 32, "--samples", 4,
        "--seqlen", 32, "--calibration", text, "--held-out", text, "--no-verify",
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "mine.jsonl (4 x 32 tokens)" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence", "way_out"),
    [
        (["--method", "zip"], "unknown method `zip`", "gptq, awq, fp8, int8"),
        (["--method", "fp8", "--bits", 4], "fp8 with 4 bits", "--bits 8"),
        (["--method", "fp8", "--group-size", 64], "takes no --group-size", "leave"),
        (["--method", "gptq", "--group-size", 48], "a group size of 48", "128, 64, 32"),
        (["--method", "awq", "--bits", 8], "other servers do not", "--bits 4"),
        (["--method", "gptq", "--bits", 3], "other servers do not", "--bits 4"),
        (["--method", "gptq", "--layout", "awq"], "not stored in the layout `awq`", "gptq or"),
        (
            ["--method", "gptq", "--group-size", 32, "--samples", 0],
            "needs calibration",
            "--samples 1",
        ),
        (["--method", "gptq", "--calibration", "my/text.txt"], "is not a file", "data set"),
        (["--method", "gptq"], "128 does not divide the 64 inputs", "--group-size 32"),
        (
            ["--method", "gptq", "--group-size", 32, "--seqlen", 1024],
            "longer than the model's context of 512",
            "512",
        ),
    ],
)
def test_refusals(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    sentence: str,
    way_out: str,
) -> None:
    assert call(tiny_checkpoint("llama"), tmp_path / "out", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    error, _, hint = " ".join(said.err.split()).partition("hint:")
    assert sentence in error
    assert way_out in hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b'{"text": "fine"}\n{"title": "no text"}', "line 2 of"),
        (b'{"text": "cut off', "line 1 of"),
        (b'{"text": "too short"}', "fewer than one sample"),
    ],
)
def test_bad_texts(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    sentence: str,
) -> None:
    text = tmp_path / "bad.jsonl"
    text.write_bytes(content)
    code = call(
        tiny_checkpoint("llama"), tmp_path / "out", "--method", "gptq", "--group-size", 32,
        "--calibration", text, "--seqlen", 128,
    )  # fmt: skip
    assert code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
