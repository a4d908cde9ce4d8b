"""Text for calibration and for measuring: from a file or from the package, as token samples.

A sample is `length` tokens of running text, begun as the tokenizer begins a text. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgi_cli.errors import UsageError
from tgi_cli.tokenizer import Tokenizer

_SHIPPED = files("tgi_cli.quantize.convert").joinpath("texts")
JOIN = "\n\n"  # between two texts of a file or data set


@dataclass(frozen=True, slots=True)
class Samples:
    """`tokens` [num_samples, length] int64, and the name of the text they come from."""

    tokens: Tensor
    source: str

    @property
    def shape(self) -> tuple[int, int]:
        """Samples, and tokens of each."""
        count, length = self.tokens.shape
        return count, length

    @property
    def digest(self) -> str:
        """A hash of the tokens, to know the same samples again."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def shipped_text(name: str) -> str:
    """`calibration` or `held_out`: texts of prose, dialogue, code and data of the package."""
    return _SHIPPED.joinpath(f"{name}.txt").read_text(encoding="utf-8")


def read_text(path: str) -> str:
    """The text of a file: `.jsonl` with a `text` (or `messages`) a line, anything else as it is.

    Raises:
        UsageError: there is no such file, or it is not text, or a line has neither field.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(
            f"the text `{path}` is not a file",
            hint="give a .txt or .jsonl file, or a data set, owner/name[:config[:split]];"
            " leave it out for the text of the package",
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"`{path}` is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            hint="give a .txt or .jsonl file in UTF-8",
        ) from error
    if file.suffix not in (".jsonl", ".ndjson"):
        return text
    lines = [line for line in text.splitlines() if line.strip()]
    return JOIN.join(_line_text(path, number, line) for number, line in enumerate(lines, 1))


def samples_of(text: str, source: str, tokenizer: Tokenizer, *, count: int, length: int) -> Samples:
    """Cut up to `count` samples of `length` tokens out of `text`, evenly over all of it.

    A text too short for that many gives those it has.

    Raises:
        UsageError: it is shorter than one sample.
    """
    start = tokenizer.encode("", True)[:1]  # BOS, where texts begin with it
    tokens = tokenizer.encode(text, False)
    step = length - len(start)
    available = len(tokens) // step
    if not available:
        raise UsageError(
            f"the text `{source}` has {len(tokens):,} tokens, fewer than one sample of {length:,}",
            hint=f"use --seqlen {max(1, len(tokens) + len(start))} or less, or a longer text",
        )
    chosen = torch.linspace(0, available - 1, min(count, available)).round().long().tolist()
    rows = [start + tokens[place * step : (place + 1) * step] for place in chosen]
    return Samples(torch.tensor(rows, dtype=torch.int64), source)


def row_text(row: dict[str, Any]) -> str | None:
    """The `text` of a row, or its `messages` one after the other; None if it has neither."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
        return "\n".join(str(each.get("content") or "") for each in messages)
    return None


def _line_text(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"line {number} of `{path}` is not JSON: {error}") from error
    text = row_text(value) if isinstance(value, dict) else None
    if text is not None:
        return text
    raise UsageError(
        f"line {number} of `{path}` has neither `text` nor `messages`",
        hint='every line is an object such as {"text": "..."}',
    )
