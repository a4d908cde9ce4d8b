"""The memory plan as people and programs read it, for `tgi launch --dry-run`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tgi_cli.cli.console import Printer

if TYPE_CHECKING:
    from tgi_cli.engine.memory_plan import MemoryPlan


def report_plan(printer: Printer, plan: MemoryPlan, *, as_json: bool) -> None:
    """Write the plan to stdout, as JSON or as a table."""
    if as_json:
        printer.json(plan.as_dict())
        return
    table = Table(title="memory plan", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("device", plan.device)
    table.add_row("dtype", str(plan.dtype).removeprefix("torch."))
    table.add_row("KV cache dtype", plan.as_dict()["kv_cache_dtype"])
    table.add_row("context", f"{plan.max_model_len:,} tokens")
    table.add_row(
        "KV cache",
        f"{plan.kv_cache_tokens:,} tokens in {plan.kv_blocks:,} blocks of {plan.block_size}",
        end_section=True,
    )
    table.add_row("weights", show_bytes(plan.weights_bytes))
    for group in plan.groups:
        kind = "full attention" if group.window is None else f"window of {group.window:,}"
        table.add_row(f"KV cache, {group.num_layers} layers, {kind}", show_bytes(group.bytes))
    table.add_row("activations", show_bytes(plan.activation_bytes), end_section=True)
    table.add_row("needed", show_bytes(plan.needed_bytes))
    table.add_row("free", show_bytes(plan.free_bytes))
    table.add_row("the whole process", show_bytes(plan.total_bytes))
    Console(file=sys.stdout, highlight=False).print(table)


def show_bytes(size: int) -> str:
    """A size in decimal units, as the engine's own sentences give it."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
