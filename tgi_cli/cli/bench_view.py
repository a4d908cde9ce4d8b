"""The live view of a running load on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tgi_cli.cli.conditions import show_seconds
from tgi_cli.cli.load import Load, LoadPlan
from tgi_cli.cli.report import summarize

_REFRESH_SECONDS = 0.5  # the view must not take the CPU from what it measures


@contextlib.asynccontextmanager
async def live_view(console: Console, load: Load, plan: LoadPlan) -> AsyncIterator[None]:
    """Draw the figures so far until the block is left."""
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def draw() -> None:
            while True:
                live.update(snapshot(load, plan), refresh=True)
                await asyncio.sleep(_REFRESH_SECONDS)

        task = asyncio.ensure_future(draw())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def snapshot(load: Load, plan: LoadPlan) -> Table:
    """The figures so far as a small table."""
    summary = summarize(load.records, duration=load.elapsed)
    goal = f" of {plan.requests}" if plan.requests is not None else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_row("elapsed", f"{load.elapsed:.0f} s")
    table.add_row("requests", f"{summary.completed + summary.failed}{goal}")
    table.add_row("in flight", str(load.in_flight))
    table.add_row("failed", ", ".join(f"{n} {kind}" for kind, n in summary.errors.items()) or "0")
    table.add_row("output", f"{summary.output_throughput:,.0f} tok/s")
    for label, distribution in (("first token", summary.ttft), ("between", summary.itl)):
        if distribution is not None:
            table.add_row(
                label, f"p50 {show_seconds(distribution.p50)}, p99 {show_seconds(distribution.p99)}"
            )
    return table
