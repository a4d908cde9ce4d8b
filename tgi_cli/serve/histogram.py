"""A histogram for the hot path: one bisection and two additions an observation.

The client library's own takes a lock and walks its buckets for every token; this one is used from
one event loop and gives the same samples. Also takes whole counts that somebody else kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric


class Histogram:
    """Counts by upper bound (inclusive), for each combination of label values.

    `bounds` rise; the last bucket, +Inf, is added. Without `labels` there is one series from the
    start, with labels one as soon as it is observed or filled.
    """

    def __init__(
        self, name: str, what: str, bounds: Sequence[float], *, labels: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._what = what
        self._labels = tuple(labels)
        self._bounds = tuple(bounds)
        self._texts = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.of()

    def of(self, *values: str) -> Series:
        """The series of these label values; keep it where it is observed often."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._bounds)
        return series

    def observe(self, value: float, *values: str) -> None:
        """Count one observation."""
        self.of(*values).observe(value)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric as the client library's registry wants it."""
        family = HistogramMetricFamily(self._name, self._what, labels=self._labels)
        for values, series in self._series.items():
            total, buckets = 0, []
            for text, count in zip(self._texts, series.counts, strict=True):
                total += count
                buckets.append((text, total))
            family.add_metric(values, buckets, series.total)
        yield family


class Series:
    """One histogram's counts: `counts[i]` lie in bucket i, `total` is the sum of all values."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def add(self, counts: Mapping[int, int], total: float) -> None:
        """Count many observations at once, given by bucket."""
        for bucket, count in counts.items():
            self.counts[min(bucket, len(self.counts) - 1)] += count
        self.total += total
