"""Does the written folder load? Asked of our own loader and of every installed one.

Each loads it in a process of its own, so that what it prints, compiles or breaks is its own affair,
and predicts the next tokens of a text; they are compared with what the conversion computed.
`python -m tgi_cli.quantize.convert.reload` is that process: a question on stdin, an answer on the
last line of stdout.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgi_cli.errors import TgiError
from tgi_cli.kernels.backend import select
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.convert.recipe import LayoutName

MAX_TOKENS = 64  # of the text
_TIMEOUT = 900.0  # seconds; GPT-QModel compiles a kernel on its first use
# Below it, the loader reads other numbers than were written; roundings of activations differ.
_LEAST_AGREEMENT = 0.8

#: Loaders by name, the packages each needs, and the layouts it is asked about.
_LOADERS: dict[str, tuple[tuple[str, ...], tuple[LayoutName, ...]]] = {
    "tgi": ((), ("gptq", "awq", "compressed-tensors")),
    "transformers + gptqmodel": (("gptqmodel", "optimum"), ("gptq", "awq")),
    "gptqmodel": (("gptqmodel",), ("gptq", "awq")),
    "transformers + compressed-tensors": (("compressed_tensors",), ("compressed-tensors",)),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One loader's answer. `state`: `yes`, `no`, `not installed` or `skipped`; `detail` says why.

    `agreement` is the fraction of next tokens that are the expected ones; None without an answer.
    """

    loader: str
    state: str
    detail: str
    agreement: float | None = None


def verify(
    folder: Path, layout: LayoutName, tokens: Sequence[int], expected: Sequence[int]
) -> list[Verdict]:
    """Ask every loader of this layout.

    Args:
        folder: the written model.
        layout: how it is stored.
        tokens: a text.
        expected: the best next token after each of them, as the conversion computed it.
    """
    return [
        _ask(name, needs, folder, tokens, expected)
        for name, (needs, layouts) in _LOADERS.items()
        if layout in layouts
    ]


def _ask(
    name: str, needs: Sequence[str], folder: Path, tokens: Sequence[int], expected: Sequence[int]
) -> Verdict:
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        return Verdict(name, "not installed", f"{' and '.join(missing)} not installed")
    question = {"loader": name, "folder": str(folder), "tokens": list(tokens)}
    # GPT-QModel's pools want two workers, also where there are fewer cores.
    command = ["env", "GPTQMODEL_CPU_WORKERS=2", sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=_TIMEOUT
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Verdict(name, "no", f"gave no answer within {_TIMEOUT:.0f} seconds")
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Verdict(name, "no", f"its process ended with status {done.returncode}: {last}")
    if "error" in answer:
        return Verdict(name, "no", answer["error"])
    agreeing = sum(a == b for a, b in zip(answer["next"], expected, strict=True))
    agreement = agreeing / len(expected)
    detail = f"{agreeing} of {len(expected)} next tokens as computed"
    return Verdict(name, "yes" if agreement >= _LEAST_AGREEMENT else "no", detail, agreement)


def _by_tgi(folder: str, tokens: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(folder).for_length(len(tokens))
    backend = select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.float32)
    count = len(tokens)
    tables = GroupTables(torch.arange(count), torch.zeros(1, 1, dtype=torch.int32))
    batch = Batch(
        input_ids=torch.tensor(tokens),
        positions=torch.arange(count),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        groups=(tables,) * len(checkpoint.spec.kv_groups),
        logit_rows=torch.arange(count),
        adapter_slots=torch.zeros(1, dtype=torch.int32),
        query_lens=(count,),
        key_lens=(count,),
    )
    caches = [
        backend.allocate_kv(
            1, count, layer.attention.num_kv_heads, layer.attention.head_dim, torch.float32
        )
        for layer in checkpoint.spec.layers
    ]
    return decoder.logits(decoder.forward(batch, caches))


def _by_transformers(folder: str, tokens: list[int]) -> torch.Tensor:
    from transformers.models.auto import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def _by_gptqmodel(folder: str, tokens: list[int]) -> torch.Tensor:
    library: Any = importlib.import_module("gptqmodel")
    model = library.GPTQModel.load(folder, device="cpu", dtype=torch.float32)
    logits: torch.Tensor = model.model(torch.tensor([tokens])).logits[0]
    return logits


_ANSWERS: dict[str, Callable[[str, list[int]], torch.Tensor]] = {
    "tgi": _by_tgi,
    "transformers + gptqmodel": _by_transformers,
    "transformers + compressed-tensors": _by_transformers,
    "gptqmodel": _by_gptqmodel,
}


def main() -> None:
    """Answer one question."""
    question = json.loads(sys.stdin.read())
    try:
        with torch.inference_mode():
            logits = _ANSWERS[question["loader"]](question["folder"], question["tokens"])
        answer: dict[str, Any] = {"next": logits.argmax(-1).tolist()}
    except TgiError as error:
        answer = {"error": error.message}
    except Exception as error:  # whatever a foreign loader raises is its answer
        first = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": f"{type(error).__name__}: {first}"[:400]}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
