"""`/metrics`: TGI's metric names and buckets, and the ones its users asked for.

One `Metrics` an HTTP worker, with a registry of its own. Engine numbers are read from the newest
`EngineStats` when scraped. TGI's counters carry no `_total`, which the client library insists on
for counters, so those pass through it as untyped; new counters have the usual names.
With several HTTP workers each answers for itself, and says so with a `worker` label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    SummaryMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from tgi_cli.engine.client import EngineClient
from tgi_cli.engine.messages import DURATION_BOUNDS, Request
from tgi_cli.errors import (
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    RequestError,
    TemplateFailed,
)
from tgi_cli.serve.engine_times import EngineTimes
from tgi_cli.serve.histogram import Histogram
from tgi_cli.serve.limits import Limits

#: Names of ignored fields that are counted apart; the rest are counted as `other`.
MAX_IGNORED_LABELS = 100


def failure_kind(error: BaseException) -> str:
    """TGI's `err` label for a failed request."""
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (Overloaded, "overloaded"),
        (TemplateFailed, "template"),
        (GenerationFailed, "generation"),
        (InvalidRequest, "validation"),
        (RequestError, "validation"),
        (Exception, "incomplete"),
    )
    return next((name for kind, name in kinds if isinstance(error, kind)), "dropped")


class Metrics:
    """Counts what this HTTP worker sees and renders it together with the engine's numbers."""

    def __init__(self, client: EngineClient, *, worker: int = 0, num_workers: int = 1) -> None:
        self._client = client
        self._labels = {"worker": str(worker)} if num_workers > 1 else {}
        self._registry = CollectorRegistry()
        self._failures: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._count = 0
        self._success = 0
        self.in_flight = 0
        self.engine_restarts = 0
        self.step_age: Callable[[], float] = lambda: 0.0
        self.engine = EngineTimes()
        self._histograms: list[Histogram] = []
        seconds = self._seconds
        self._duration = seconds("request_duration", "from acceptance to the last token")
        self._validation = seconds("request_validation_duration", "templating, tokenizing, checks")
        self._queue = seconds("request_queue_duration", "from acceptance to the first step")
        self._inference = seconds("request_inference_duration", "from the first step to the end")
        self._per_token = seconds(
            "request_mean_time_per_token_duration", "inference time by generated tokens"
        )
        self._first_token = seconds(
            "request_time_to_first_token_duration", "from acceptance to the first token (TTFT)"
        )
        self._inter_token = seconds(
            "request_inter_token_duration", "between tokens of one sequence (ITL)"
        ).of()
        self._tenant_queue = seconds(
            "tenant_queue_duration", "from acceptance to the first step, by tenant", "tenant"
        )
        self._tenant_tokens: Counter[tuple[str, str]] = Counter()
        self._lengths: tuple[Histogram, Histogram, Histogram] | None = None
        self._registry.register(self)

    def _seconds(self, name: str, what: str, *labels: str) -> Histogram:
        return self._histogram(f"tgi_{name}", f"Seconds {what}", DURATION_BOUNDS, labels)

    def _histogram(
        self, name: str, what: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        self._histograms.append(Histogram(name, what, bounds, labels=labels))
        return self._histograms[-1]

    def model_ready(self, limits: Limits) -> None:
        """Make the length histograms, whose buckets need the limits; once."""
        if self._lengths is not None:
            return

        def lengths(name: str, what: str, top: int) -> Histogram:
            buckets = [top * i / 100 for i in range(1, 101)]
            return self._histogram(f"tgi_{name}", what, buckets)

        total = limits.max_total_tokens
        self._lengths = (
            lengths("request_input_length", "Prompt tokens", limits.max_input_tokens),
            lengths("request_max_new_tokens", "New tokens allowed", total),
            lengths("request_generated_tokens", "New tokens generated", total),
        )

    def accepted(self) -> None:
        """Count one generation request, whatever becomes of it."""
        self._count += 1

    def succeeded(self) -> None:
        """Count one generation request that was answered in full."""
        self._success += 1

    def failed(self, error: BaseException) -> None:
        """Count one generation request that was not."""
        self._failures[failure_kind(error)] += 1

    def ignored_field(self, name: str) -> bool:
        """Count a request field that had no effect; tell whether it is seen for the first time.

        Clients choose the names, so only so many get a label of their own.
        """
        known = name in self._ignored
        room = len(self._ignored) < MAX_IGNORED_LABELS
        self._ignored[name if known or room else "other"] += 1
        return not known and room

    def validated(self, seconds: float) -> None:
        """Record how long checks, template and tokenizer took."""
        self._validation.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the time to the first token of one sequence."""
        self._first_token.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        """Record the latency of `count` tokens that came `seconds` after those before."""
        self._inter_token.observe(seconds / count)

    def finished(
        self, request: Request, *, num_generated: int, queue_time: float, total_time: float
    ) -> None:
        """Record one sequence that came to its end; times in seconds."""
        inference = max(0.0, total_time - queue_time)
        num_prompt = len(request.prompt_ids)
        self._duration.observe(total_time)
        self._queue.observe(queue_time)
        self._inference.observe(inference)
        self._per_token.observe(inference / max(1, num_generated))
        self._tenant_queue.observe(queue_time, request.tenant)
        if self._lengths is not None:
            inputs, allowed, outputs = self._lengths
            inputs.observe(num_prompt)
            allowed.observe(request.sampling.max_tokens)
            outputs.observe(num_generated)

    def ended(self, request: Request, num_generated: int) -> None:
        """Count the tokens of one sequence that is over, whatever it came to."""
        self._tenant_tokens[request.tenant, "prompt"] += len(request.prompt_ids)
        self._tenant_tokens[request.tenant, "generated"] += num_generated

    def collect(self) -> Iterator[Metric]:
        """Yield the plain counters and gauges (the registry calls this on a scrape)."""
        stats, facts = self._client.stats, self._client.facts
        capacity = 0 if facts is None else facts.kv_cache_tokens
        yield UnknownMetricFamily("tgi_request_count", "Generation requests", self._count)
        yield UnknownMetricFamily("tgi_request_success", "Requests answered", self._success)
        failures = UnknownMetricFamily("tgi_request_failure", "Requests failed", labels=["err"])
        for kind, count in sorted(self._failures.items()):
            failures.add_metric([kind], count)
        yield failures
        ignored = CounterMetricFamily(
            "tgi_ignored_fields", "Request fields that had no effect", labels=["field"]
        )
        for name, count in sorted(self._ignored.items()):
            ignored.add_metric([name], count)
        yield ignored
        tokens = CounterMetricFamily(
            "tgi_tenant_tokens", "Tokens of sequences that are over", labels=["tenant", "kind"]
        )
        for (tenant, kind), count in sorted(self._tenant_tokens.items()):
            tokens.add_metric([tenant, kind], count)
        yield tokens
        for histogram in self._histograms:
            yield from histogram.collect()
        yield from self.engine.collect()
        gauges = (
            ("tgi_queue_size", "Sequences waiting in the engine", stats.num_waiting),
            ("tgi_running_sequences", "Sequences running in the engine", stats.num_running),
            ("tgi_batch_current_size", "Sequences in the last step", stats.batch_size),
            ("tgi_batch_current_tokens", "Tokens computed in the last step", stats.batch_tokens),
            (
                "tgi_batch_last_forward_seconds",
                "Duration of the last step",
                stats.last_step_seconds,
            ),
            ("tgi_kv_blocks_used", "KV blocks held by live sequences", stats.kv_blocks_used),
            ("tgi_kv_blocks_total", "KV blocks in the cache", stats.kv_blocks_total),
            ("tgi_batch_max_total_tokens", "Tokens the KV cache holds", capacity),
            ("tgi_http_requests_in_flight", "HTTP requests being answered", self.in_flight),
            ("tgi_engine_ready", "1 when the engine can serve", self._client.state == "ready"),
            ("tgi_engine_step_age_seconds", "Age of the step being run", self.step_age()),
        )
        for name, what, value in gauges:
            yield GaugeMetricFamily(name, what, float(value))
        ranks = GaugeMetricFamily(
            "tgi_rank_weights_bytes",
            "Weights that one rank of a model in several processes holds",
            labels=["rank", "host", "pid", "threads"],
        )
        for rank in () if facts is None else facts.ranks:
            where = [str(rank.rank), rank.host, str(rank.pid), str(rank.num_threads)]
            ranks.add_metric(where, float(rank.weights_bytes))
        yield ranks
        counters = (
            ("tgi_engine_steps", "Steps run by this engine", stats.num_steps),
            ("tgi_engine_prompt_tokens", "Prompt tokens computed or found", stats.prompt_tokens),
            ("tgi_engine_generated_tokens", "Tokens the engine generated", stats.generated_tokens),
            ("tgi_prefix_cache_query_tokens", "Tokens looked up", stats.prefix_query_tokens),
            ("tgi_prefix_cache_hit_tokens", "Tokens found cached", stats.prefix_hit_tokens),
            ("tgi_preemptions", "Sequences preempted", stats.preemptions),
            ("tgi_draft_tokens", "Draft tokens verified", stats.draft_tokens),
            ("tgi_engine_restarts", "Engine restarts", self.engine_restarts),
        )
        for name, what, value in counters:
            yield CounterMetricFamily(name, what, float(value))
        yield SummaryMetricFamily(
            "tgi_request_skipped_tokens",
            "Draft tokens accepted, by sequence and step",
            count_value=stats.verifications,
            sum_value=float(stats.accepted_draft_tokens),
        )

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        text: bytes = generate_latest(_Labelled(self._registry.collect, self._labels))
        return text.replace(b" untyped\n", b" counter\n")


class _Labelled:
    """A registry's metrics with constant labels added."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], labels: dict[str, str]) -> None:
        self._collect = collect
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for metric in self._collect():
            if self._labels:
                metric.samples = [self._relabel(sample) for sample in metric.samples]
            yield metric

    def _relabel(self, sample: Sample) -> Sample:
        return sample._replace(labels={**sample.labels, **self._labels})
