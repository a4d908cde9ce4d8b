"""What a load run amounts to: distributions, throughputs, errors, as data and as tables.

Works on the records alone; knows neither servers nor how the load was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from tgi_cli.cli.conditions import LATENCIES, STATISTICS, Condition, show_seconds
from tgi_cli.cli.load import RequestRecord

_LEGEND = "latency to the first token (TTFT), between pieces (ITL), per later token (TPOT)"


class Distribution(msgspec.Struct, frozen=True):
    """Statistics of one latency, in seconds; percentiles interpolate linearly."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """The distribution of the values that are there, None when there are none."""
        data = np.array([value for value in values if value is not None], dtype=np.float64)
        if not data.size:
            return None
        p50, p90, p95, p99 = np.percentile(data, [50, 90, 95, 99]).tolist()
        return cls(
            data.size, float(data.mean()), float(data.min()), p50, p90, p95, p99, float(data.max())
        )


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Throughputs are per second of `duration`: first arrival to last answer."""

    duration: float
    completed: int
    failed: int
    unfinished: int
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    min_prompt_tokens: int
    max_prompt_tokens: int
    short_answers: int  # with fewer tokens than asked for
    counted_by_server: bool
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float  # requests/s that met every --slo; all completed ones without any
    error_rate: float
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lag: Distribution | None  # of the load generator itself

    def metric(self, name: str) -> float | None:
        """A value that `--fail-if` can name."""
        statistic, _, latency = name.partition("_")
        if latency in LATENCIES and statistic in STATISTICS:
            distribution: Distribution | None = getattr(self, latency)
            return None if distribution is None else float(getattr(distribution, statistic))
        if name == "error_rate" and not self.completed + self.failed:
            return None
        return float(getattr(self, name))


def summarize(
    records: Sequence[RequestRecord],
    *,
    duration: float,
    unfinished: int = 0,
    output_tokens: int = 0,
    slos: Sequence[Condition] = (),
) -> Summary:
    """Condense records; `output_tokens` is what each answer was asked to have."""
    done = [record for record in records if record.error is None]
    failed = len(records) - len(done)
    seconds = max(duration, 1e-9)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    completion_tokens = sum(record.completion_tokens for record in done)
    good = sum(all(slo.holds(getattr(record, slo.metric)) for slo in slos) for record in done)
    return Summary(
        duration=duration,
        completed=len(done),
        failed=failed,
        unfinished=unfinished,
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        min_prompt_tokens=min((record.prompt_tokens for record in done), default=0),
        max_prompt_tokens=max((record.prompt_tokens for record in done), default=0),
        short_answers=sum(record.completion_tokens < output_tokens for record in done),
        counted_by_server=all(record.counted_by_server for record in done),
        request_throughput=len(done) / seconds,
        output_throughput=completion_tokens / seconds,
        total_throughput=(prompt_tokens + completion_tokens) / seconds,
        goodput=good / seconds,
        error_rate=failed / max(len(records), 1),
        ttft=Distribution.of(record.ttft for record in done),
        itl=Distribution.of(gap for record in done for gap in record.itl),
        tpot=Distribution.of(record.tpot for record in done),
        e2e=Distribution.of(record.e2e for record in done),
        lag=Distribution.of(record.lag for record in records),
    )


def tables(summary: Summary) -> Group:
    """The report that people read."""
    latencies = Table(title=_LEGEND, title_justify="left", box=box.SIMPLE, padding=0)
    latencies.add_column("", no_wrap=True)
    for statistic in STATISTICS:
        latencies.add_column(statistic, justify="right", no_wrap=True)
    for name, label in zip(
        LATENCIES,
        ("TTFT", "ITL", "TPOT", "end to end"),
        strict=True,
    ):
        distribution = getattr(summary, name)
        latencies.add_row(
            label,
            *(
                show_seconds(getattr(distribution, stat)) if distribution else "-"
                for stat in STATISTICS
            ),
        )
    figures = Table(title="throughput", title_justify="left", show_header=False, box=box.SIMPLE)
    figures.add_column()
    figures.add_column(justify="right")
    for label, value in (
        ("output", f"{summary.output_throughput:,.1f} tok/s"),
        ("prompt and output", f"{summary.total_throughput:,.1f} tok/s"),
        ("requests", f"{summary.request_throughput:,.2f} req/s"),
        ("goodput", f"{summary.goodput:,.2f} req/s"),
        ("completed", f"{summary.completed:,} in {summary.duration:,.1f} s"),
        ("prompt tokens", _span(summary)),
        ("output tokens", f"{summary.completion_tokens:,}"),
        ("failed", f"{summary.failed:,} ({summary.error_rate:.1%})"),
        *((f"  {kind}", f"{count:,}") for kind, count in summary.errors.items()),
        *((("cut off by Ctrl-C", f"{summary.unfinished:,}"),) if summary.unfinished else ()),
    ):
        figures.add_row(label, value)
    return Group(latencies, figures)


def remarks(summary: Summary, input_tokens: int, output_tokens: int) -> list[str]:
    """What a reader of the figures must know: where the load was not what was asked for."""
    said = []
    low, high = summary.min_prompt_tokens, summary.max_prompt_tokens
    if summary.completed and summary.counted_by_server and (low, high) != (input_tokens,) * 2:
        said.append(f"prompts had {low} to {high} tokens, not {input_tokens}")
    if summary.short_answers:
        said.append(
            f"{summary.short_answers} answers had fewer than {output_tokens} tokens; "
            "does the server know `ignore_eos`?"
        )
    if not summary.counted_by_server:
        said.append("the server sends no token counts: output tokens are pieces of text instead")
    if summary.lag and summary.lag.p99 > 0.05:
        said.append(
            f"1 % of the requests were sent {show_seconds(summary.lag.p99)} late or more: "
            "the load generator or --concurrency holds them back"
        )
    return said


def _span(summary: Summary) -> str:
    if summary.min_prompt_tokens == summary.max_prompt_tokens:
        return f"{summary.prompt_tokens:,} ({summary.max_prompt_tokens} each)"
    return f"{summary.prompt_tokens:,} ({summary.min_prompt_tokens} to {summary.max_prompt_tokens})"
