"""The JSON result of `tgi bench`: figures together with what they were measured on and how.

A figure without machine, versions, model and command cannot be compared with another one.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import tgi_cli
from tgi_cli.cli.conditions import Condition
from tgi_cli.cli.load import Load, RequestRecord
from tgi_cli.cli.report import Summary, remarks, summarize

_SECRET_FLAG = "--api-key"


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `schema` changes when fields change their meaning; times are in seconds."""

    schema: int = 1
    started: str
    command: str
    model: str
    url: str
    server: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    plan: dict[str, Any]
    summary: Summary
    remarks: list[str]
    requests: list[RequestRecord]

    @classmethod
    def of(
        cls,
        load: Load,
        *,
        output_tokens: int,
        slos: Sequence[Condition],
        plan: dict[str, Any],
        **facts: Any,
    ) -> BenchResult:
        """Summarize a load that has ended."""
        summary = summarize(
            load.records,
            duration=load.span,
            unfinished=load.unfinished,
            output_tokens=output_tokens,
            slos=slos,
        )
        return cls(
            **facts,
            plan=plan,
            versions={"tgi": tgi_cli.__version__, "python": platform.python_version()},
            summary=summary,
            remarks=remarks(summary, plan["input_tokens"], output_tokens),
            requests=sorted(load.records, key=lambda record: record.index),
        )


def machine() -> dict[str, Any]:
    """The machine that the load came from."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": list(os.getloadavg()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def shown_command(argv: Sequence[str]) -> str:
    """The command line with its API key masked."""
    shown = []
    for index, word in enumerate(argv):
        if index and argv[index - 1] == _SECRET_FLAG:
            word = "***"
        elif word.startswith(f"{_SECRET_FLAG}="):
            word = f"{_SECRET_FLAG}=***"
        shown.append(Path(word).name if index == 0 else word)
    return " ".join(shown)
