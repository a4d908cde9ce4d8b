"""Conditions on measured numbers: `p99_ttft>500ms`, `output_throughput<100tok/s`, `error_rate>1%`.

Parsed before any load is made, so that a typing error costs nothing. Latencies and shares must
carry their unit, because a bare 500 could be either milliseconds or seconds.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping

import msgspec

from tgi_cli.errors import UsageError

#: Latencies, in seconds, that a whole run has statistics of.
LATENCIES = ("ttft", "itl", "tpot", "e2e")
STATISTICS = ("mean", "min", "p50", "p90", "p95", "p99", "max")

#: Units by quantity, with the factor that turns a number into the quantity's own unit.
_UNITS: dict[str, dict[str, float]] = {
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "tokens": {"": 1.0, "tok/s": 1.0, "tokens/s": 1.0},
    "requests": {"": 1.0, "req/s": 1.0, "requests/s": 1.0},
    "share": {"%": 0.01},
    "count": {"": 1.0},
}

#: What `--fail-if` may name, and the quantity it is.
RUN_METRICS: dict[str, str] = {
    **{f"{stat}_{name}": "latency" for name in LATENCIES for stat in STATISTICS},
    "output_throughput": "tokens",
    "total_throughput": "tokens",
    "request_throughput": "requests",
    "goodput": "requests",
    "error_rate": "share",
    "completed": "count",
    "failed": "count",
}

#: What `--slo` may name: measured of every single request.
REQUEST_METRICS: dict[str, str] = {"ttft": "latency", "tpot": "latency", "e2e": "latency"}

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_SHAPE = re.compile(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*([0-9.]+(?:e[+-]?\d+)?)\s*(\S*)\s*", re.I)


class Condition(msgspec.Struct, frozen=True):
    """One comparison; `limit` is in seconds, tokens/s, requests/s, a share of 1, or a count."""

    text: str
    metric: str
    comparison: str
    limit: float

    def holds(self, value: float | None) -> bool | None:
        """Whether it is so; None when the metric was not measured."""
        if value is None or math.isnan(value):
            return None
        return _OPERATORS[self.comparison](value, self.limit)


def parse_condition(flag: str, text: str, metrics: Mapping[str, str]) -> Condition:
    """Read a condition on one of `metrics`. Raises `UsageError` naming what is wrong."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{flag} {text!r} is not a condition", hint=f'write for example {flag} "{_EXAMPLE}"'
        )
    metric, comparison, number, unit = match.groups()
    quantity = metrics.get(metric.lower())
    if quantity is None:
        raise UsageError(
            f"{flag} names {metric!r}, which is not measured",
            hint=f"measured are {', '.join(metrics)}",
        )
    units = _UNITS[quantity]
    if unit.lower() not in units:
        raise UsageError(
            f"{flag} {text!r} has {f'the unit {unit!r}' if unit else 'no unit'} "
            f"but {metric} is in {' or '.join(name for name in units if name) or 'no unit'}"
        )
    try:
        limit = float(number) * units[unit.lower()]
    except ValueError:
        raise UsageError(f"{flag} {text!r} compares with {number!r}, not a number") from None
    return Condition(text.strip(), metric.lower(), comparison, limit)


def show_value(metric: str, value: float | None) -> str:
    """A measured value in the unit people use for it."""
    if value is None or math.isnan(value):
        return "not measured"
    match RUN_METRICS.get(metric, "latency"):
        case "latency":
            return show_seconds(value)
        case "tokens":
            return f"{value:.1f} tok/s"
        case "requests":
            return f"{value:.3g} req/s"
        case "share":
            return f"{value:.2%}"
    return f"{value:g}"


def show_seconds(value: float | None) -> str:
    """A duration: milliseconds below a second."""
    if value is None or math.isnan(value):
        return "-"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


_EXAMPLE = "p99_ttft>500ms"
