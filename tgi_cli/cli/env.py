"""`tgi env`: what a bug report needs, as text or JSON. The facts come from `env_report`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tgi_cli.cli import env_report
from tgi_cli.cli.console import invocation


def command(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show versions, hardware and kernels in use, for bug reports.

    Keys, tokens and logins in addresses are masked.
    """
    printer = invocation(ctx).printer
    report = env_report.collect()
    if as_json:
        printer.json(report)
        return
    lines = list(_lines(report))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        printer.data(f"{name:<{width}}  {text}".rstrip())


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as names and texts, in the order people read it."""
    yield "tgi", report["tgi"]
    yield "python", report["python"]
    for name, version in report["packages"].items():
        yield name, version or "not installed"
    yield "os", report["os"]["platform"]
    yield "libc", report["os"]["libc"]
    cpu, memory, kernels = report["cpu"], report["memory"], report["kernels"]
    yield "cpu", f"{cpu['model']} ({cpu['architecture']})"
    yield "cpu features", " ".join(cpu["features"]) or "unknown"
    yield "cores", f"{cpu['usable_cores']} usable of {cpu['cores']}"
    yield "NUMA nodes", str(max(1, len(cpu["numa_nodes"])))
    for count, shares in cpu["cores_of_shards"].items():
        listed = "; ".join(",".join(map(str, share)) for share in shares)
        yield f"cores of {count} shards", listed
    yield (
        "memory",
        f"{_gib(memory['available_bytes'])} free of {_gib(memory['total_bytes'])}",
    )
    for rank in report["ranks"]:
        cores = ",".join(map(str, rank["cores"]))
        yield f"rank {rank['rank']}", f"process {rank['pid']} on cores {cores}"
    if "error" in kernels:
        yield "kernels", kernels["error"]
    else:
        yield "kernels", f"{kernels['backend']} on {kernels['device']}"
        yield "kernel threads", str(kernels["threads"])
        yield "kernel memory", f"{_gib(kernels['free_bytes'])} free, by the container's limit"
        yield "huge pages", _huge_pages(kernels["huge_pages"])
        yield "deterministic", str(kernels["deterministic"]).lower()
        yield "KV cache dtypes", " ".join(kernels["kv_cache_dtypes"])
        yield "cuda", kernels["cuda"] or "this build of torch has none"
    for index, gpu in enumerate(report["gpus"]):
        yield (
            f"gpu {index}",
            f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, capability {gpu['compute_capability']}",
        )
    if not report["gpus"]:
        yield "gpus", "none"
    for name, value in report["environment"].items():
        yield name, value


def _huge_pages(setting: str | None) -> str:
    if setting in ("always", "madvise"):
        return f"for weights and KV cache ({setting})"
    if setting is None:
        return "none on this system"
    return (
        f"{setting}; with them decoding takes a fifth less time: "
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
