"""How a conversion looks: a bar with what is left on a terminal, lines elsewhere, then the report.

Knows the shape of the reports alone, not how they come about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from tgi_cli.cli.console import Printer

if TYPE_CHECKING:
    from tgi_cli.quantize.convert.job import Listener, Progress
    from tgi_cli.quantize.convert.report import Report


@contextmanager
def shown(printer: Printer) -> Iterator[Listener]:
    """A listener that shows finished layers, their errors and the time left."""
    if not printer.animated:
        lines = _Lines(printer)
        yield lines
        return
    columns = (
        TextColumn("layers"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Bars(*columns, console=printer.console, expand=True) as bars:
        task = bars.add_task("", total=None)

        def listen(progress: Progress) -> None:
            total, text = progress.num_layers, _errors(progress)
            if progress.resumed:  # these layers must not count into the speed
                bars.reset(task, total=total, completed=progress.layer, description=text)
            else:
                bars.update(task, total=total, completed=progress.layer, description=text)

        yield listen


class _Lines:
    """A line for each layer."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._seconds: list[float] = []

    def __call__(self, progress: Progress) -> None:
        place = f"layer {progress.layer} of {progress.num_layers}"
        if progress.resumed:
            self._printer.say(f"{place} was finished before; going on from there")
            return
        self._seconds.append(progress.seconds)
        left = (progress.num_layers - progress.layer) * sum(self._seconds) / len(self._seconds)
        self._printer.say(f"{place}: {_errors(progress)}, about {left:.0f} s left")


def tell(printer: Printer, report: Report) -> None:
    """Say what has become of the model."""
    rows = [
        *report.rows(),
        *((f"worst: {name}", f"error {error:.4f}") for name, error in report.outcome.worst()),
        *(
            (f"loads in {verdict.loader}", f"{verdict.state}: {verdict.detail}")
            for verdict in report.verdicts
        ),
    ]
    if printer.quiet:
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(name, text)
    printer.console.print(table)


def _errors(progress: Progress) -> str:
    if not progress.errors:
        return ""
    worst = max(progress.errors, key=lambda name: progress.errors[name])
    mean = sum(progress.errors.values()) / len(progress.errors)
    return f"mean error {mean:.4f}, worst {progress.errors[worst]:.4f} ({worst.split('.')[-1]})"
