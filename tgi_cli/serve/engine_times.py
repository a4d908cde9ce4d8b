"""The engine's steps as TGI's `tgi_batch_*` metrics, from what its heartbeats say.

An engine counts from zero when it starts, as every process does under Prometheus; only failures are
counted here, because whoever fails cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.metrics_core import Metric

from tgi_cli.engine.messages import DURATION_BOUNDS, Heartbeat, Spread, StepRecord
from tgi_cli.serve.histogram import Histogram

#: TGI's buckets of `tgi_batch_next_size`.
_SIZES = tuple(float(size) for size in range(1, 1025))
_METHODS = ("prefill", "decode")
_TIMES = (
    ("inference", "tgi_batch_inference_duration", "Seconds a step took, all in all"),
    ("forward", "tgi_batch_forward_duration", "Seconds computing a step: model and sampler"),
    ("decode", "tgi_batch_decode_duration", "Seconds booking a step's tokens"),
    ("filter", "tgi_batch_filter_duration", "Seconds booking a step that ended some sequence"),
)


class EngineTimes:
    """The last heartbeat of the engine, and how often engines failed in the middle of a step."""

    def __init__(self) -> None:
        self._record = StepRecord()
        self._tokens = (0, 0)
        self._failures: Counter[str] = Counter()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Take what the engine says of itself."""
        if heartbeat.steps is not None:
            self._record = heartbeat.steps
        self._tokens = (heartbeat.tokens_held, heartbeat.tokens_allowed)

    def lost(self) -> None:
        """The engine is gone: a step that had begun and was not done has failed."""
        for method, times in self._record.times.items():
            self._failures[method] += times.begun - times.done
        self._record = StepRecord()
        self._tokens = (0, 0)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, as the client library's registry wants them."""
        record = self._record
        for name, what, kind in (
            ("tgi_batch_inference_count", "Steps begun", "begun"),
            ("tgi_batch_inference_success", "Steps done", "done"),
        ):
            counts = UnknownMetricFamily(name, what, labels=["method"])
            for method in _METHODS:
                times = record.times.get(method)
                counts.add_metric([method], getattr(times, kind) if times is not None else 0)
            yield counts
        failures = UnknownMetricFamily(
            "tgi_batch_inference_failure", "Steps the engine died in", labels=["method"]
        )
        for method in _METHODS:
            failures.add_metric([method], self._failures[method])
        yield failures
        for field, name, what in _TIMES:
            histogram = Histogram(name, what, DURATION_BOUNDS, labels=["method"])
            for method in _METHODS:
                times = record.times.get(method)
                spread = Spread({}, 0.0) if times is None else getattr(times, field)
                histogram.of(method).add(spread.counts, spread.total)
            yield from histogram.collect()
        joins = UnknownMetricFamily(
            "tgi_batch_concat", "Steps in which sequences joined running ones", labels=["reason"]
        )
        joins.add_metric(["chunking"], record.num_joins)
        yield joins
        joining = Histogram(
            "tgi_batch_concat_duration",
            "Seconds deciding on a step in which sequences joined",
            DURATION_BOUNDS,
            labels=["method"],
        )
        joining.of("decode").add(record.joining.counts, record.joining.total)
        yield from joining.collect()
        sizes = Histogram("tgi_batch_next_size", "Sequences that joined in one step", _SIZES)
        # Sizes are counted as they are, and bucket i holds size i + 1.
        sizes.of().add(
            {size - 1: count for size, count in record.joined.counts.items()}, record.joined.total
        )
        yield from sizes.collect()
        held, allowed = self._tokens
        yield GaugeMetricFamily("tgi_batch_total_tokens", "Tokens of running sequences", held)
        yield GaugeMetricFamily(
            "tgi_batch_current_max_tokens", "Tokens running sequences may come to", allowed
        )
