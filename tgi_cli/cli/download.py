"""`tgi download`: a model's files, with bars on a terminal and plain lines elsewhere.

What is fetched, and how, is `tgi_cli.hub`'s business; this file only shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from tgi_cli import hub, log
from tgi_cli.cli.console import Printer, invocation
from tgi_cli.hub_faults import gigabytes
from tgi_cli.hub_transfer import Listener, Progress

_PLAIN_EVERY = 0.1  # of all bytes, between two lines where no bar can be drawn


def command(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="org/name, org/name:QUANT for GGUF, a local folder, or `demo`."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; the main branch if not given.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Fetch exactly the files that match. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave files out. Repeatable.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Access token of the hub; HF_TOKEN if not given.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where to keep it; the hub's own cache if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print path, commit and files as JSON.")
    ] = False,
) -> None:
    """Fetch a model into the local cache and print its path.

    Run it again after an interruption and it goes on where it stopped.
    """
    printer = invocation(ctx).printer
    log.configure("INFO" if printer.verbose else "WARNING")
    if not printer.verbose:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # retries are ours to report
    with _view(printer) as listener:
        found = hub.download(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            listener=listener,
        )
    if as_json:
        printer.json(_report(found))
    else:
        printer.data(str(found.path))


def _report(found: hub.Download) -> dict[str, Any]:
    files = [{"name": n, "size": (found.folder / n).stat().st_size} for n in found.files]
    return {
        "model_id": found.model_id,
        "path": str(found.path),
        "commit": found.commit,
        "size": sum(file["size"] for file in files),
        "files": files,
    }


@contextmanager
def _view(printer: Printer) -> Iterator[Listener]:
    if not printer.animated:
        yield _PlainView(printer)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=printer.console, expand=True) as bars:
        yield _LiveView(bars, printer.console.height)


class _Totals:
    """Sums the newest report of every file of a stage."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], Progress] = {}

    def add(self, report: Progress) -> tuple[int, int]:
        """Take in a report; return bytes done and bytes in all of its stage."""
        self._newest[report.stage, report.name] = report
        stage = [r for r in self._newest.values() if r.stage == report.stage]
        return sum(r.done for r in stage), sum(r.total for r in stage)


class _LiveView:
    """One bar for each file under way and, above them, one for all."""

    def __init__(self, bars: Bars, height: int) -> None:
        self._bars = bars
        self._rows = max(height - 3, 1)
        self._totals = _Totals()
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __call__(self, report: Progress) -> None:
        done, total = self._totals.add(report)
        label = "all files" if report.stage == "download" else "converting"
        self._show((report.stage, ""), label, done, total)
        self._show((report.stage, report.name), f"  {report.name}", report.done, report.total)
        if report.done >= report.total and len(self._tasks) > self._rows:
            self._bars.update(self._tasks[report.stage, report.name], visible=False)

    def _show(self, key: tuple[str, str], label: str, done: int, total: int) -> None:
        if key not in self._tasks:
            # Bytes that were here before do not count into the speed.
            self._tasks[key] = self._bars.add_task(label, total=total, completed=done)
        self._bars.update(self._tasks[key], completed=done, total=total)


class _PlainView:
    """A line per finished file and per tenth of the whole."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._totals = _Totals()
        self._begun: set[tuple[str, str]] = set()
        self._next = _PLAIN_EVERY

    def __call__(self, report: Progress) -> None:
        done, total = self._totals.add(report)
        key = (report.stage, report.name)
        unseen = key not in self._begun
        self._begun.add(key)
        if report.done >= report.total and report.stage == "convert":
            self._printer.say(f"converted {report.name}")
        elif report.done >= report.total:
            here = "is here already" if unseen else "done"
            self._printer.say(f"{report.name} ({gigabytes(report.total)}) {here}")
        elif not unseen and report.stage == "download" and done >= self._next * total:
            self._printer.say(f"{done / total:.0%} of {gigabytes(total)}")
            self._next = done / total + _PLAIN_EVERY
