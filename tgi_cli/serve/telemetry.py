"""Traces: a server span for each exchange and below it `validate`, `queue`, `prefill`, `decode`.

Attributes follow OpenTelemetry's conventions for HTTP and for generative AI; W3C's `traceparent` is
read from requests and sent with answers. Imported only with `--otlp-endpoint`, and needs the extra
`otel`. The engine is not asked for anything: an answer's own times say all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from aiohttp import web
from aiohttp.typedefs import Middleware
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from tgi_cli import __version__
from tgi_cli.config import ServerConfig
from tgi_cli.serve.answer import Answer
from tgi_cli.serve.exchange import TENANT
from tgi_cli.serve.observe import ID
from tgi_cli.serve.telemetry_exporter import make_exporter

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: The service's name in TGI's traces.
DEFAULT_SERVICE = "text-generation-inference.router"
#: Seconds that spans not yet sent have when the server ends.
_FLUSH_SECONDS = 3.0

_FINISH = {"length": "length", "eos": "stop", "stop": "stop", "stop_string": "stop"}
_TEXT_PATHS = ("/v1/completions", "/generate", "/generate_stream", "/")


class Exchange:
    """One traced exchange: its server span, and what is known of its answers so far."""

    def __init__(self, span: Span, started: int) -> None:
        self.span = span
        self.started = started  # nanoseconds since 1970
        self.validated = False
        self.num_prompt_tokens = 0
        self.num_generated = 0
        self.finishes: list[str] = []


_EXCHANGE: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
EXCHANGE = web.RequestKey("exchange", Exchange)


class Tracing:
    """Makes and sends the spans of one HTTP worker. `model` is the name clients know it by."""

    def __init__(self, config: ServerConfig, model: str) -> None:
        self._model = model
        self._provider = TracerProvider(
            resource=Resource.create(
                {
                    "service.name": config.otlp_service_name or DEFAULT_SERVICE,
                    "service.version": __version__,
                }
            )
        )
        self._provider.add_span_processor(BatchSpanProcessor(make_exporter(config)))
        self._tracer = self._provider.get_tracer("tgi_cli", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @property
    def middleware(self) -> Middleware:
        """Puts a server span around an exchange that POSTs; the others are of no interest."""

        @web.middleware
        async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method != "POST":
                return await handler(request)
            exchange = self._begin(request)
            request[EXCHANGE] = exchange
            token = _EXCHANGE.set(exchange)
            status = 499  # the client went away, unless there is an answer
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                _EXCHANGE.reset(token)
                self._end(request, exchange, status)

        return traced

    async def stamp(self, request: web.Request, response: web.StreamResponse) -> None:
        """Send the span's context back (an `on_response_prepare` signal)."""
        exchange = request.get(EXCHANGE)
        if exchange is not None:
            self._propagator.inject(response.headers, trace.set_span_in_context(exchange.span))

    def answered(self, answer: Answer) -> None:
        """An answer is over: make its spans. Called in the context of its exchange."""
        exchange = _EXCHANGE.get()
        if exchange is None:
            return
        request = answer.request
        arrived = int(request.arrival * 1e9)
        self._validated(exchange, arrived)
        context = trace.set_span_in_context(exchange.span)
        now = time.time_ns()
        first = min(now, arrived + int(answer.first_token_time * 1e9))
        admitted = min(first, arrived + int(answer.queue_time * 1e9))
        if answer.output_ids:
            self._span("queue", arrived, admitted, context)
            self._span("prefill", admitted, first, context, self._prefill(answer))
            self._span("decode", first, now, context, self._decode(answer))
        else:
            self._span("queue", arrived, now, context)
        if request.id.endswith("-0"):  # the children of one prompt read it once
            exchange.num_prompt_tokens += len(request.prompt_ids)
        exchange.num_generated += len(answer.output_ids)
        exchange.finishes.append(_FINISH.get(answer.finish or "", "error"))
        for name, value in self._asked(answer).items():
            exchange.span.set_attribute(name, value)

    async def close(self) -> None:
        """Send what has not been sent, but do not wait long for a collector that is away."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await loop.run_in_executor(None, self._provider.shutdown)
        except TimeoutError:
            pass

    def flush(self) -> None:
        """Send everything now; blocks."""
        self._provider.force_flush()

    def _begin(self, request: web.Request) -> Exchange:
        resource = request.match_info.route.resource
        route = request.path if resource is None else resource.canonical
        operation = "text_completion" if route in _TEXT_PATHS else "chat"
        started = time.time_ns()
        span = self._tracer.start_span(
            f"POST {route}",
            context=self._propagator.extract(request.headers),
            kind=SpanKind.SERVER,
            start_time=started,
            attributes={
                "http.request.method": request.method,
                "http.route": route,
                "url.path": request.rel_url.raw_path,
                "url.scheme": request.scheme,
                "server.address": request.host,
                "client.address": request.remote or "",
                "user_agent.original": request.headers.get("User-Agent", ""),
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "tgi",
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
            },
        )
        return Exchange(span, started)

    def _end(self, request: web.Request, exchange: Exchange, status: int) -> None:
        self._validated(exchange, time.time_ns())
        span = exchange.span
        span.set_attribute("http.response.status_code", status)
        if ID in request:
            span.set_attribute("tgi.request_id", request[ID])
        if request.get(TENANT):
            span.set_attribute("tgi.tenant", request[TENANT])
        if exchange.finishes:
            span.set_attribute("gen_ai.usage.input_tokens", exchange.num_prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", exchange.num_generated)
            span.set_attribute("gen_ai.response.finish_reasons", exchange.finishes)
        if status >= 500 or (status < 400 and "error" in exchange.finishes):
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", str(status) if status >= 500 else "stream")
        span.end()

    def _validated(self, exchange: Exchange, ended: int) -> None:
        if not exchange.validated:
            exchange.validated = True
            context = trace.set_span_in_context(exchange.span)
            self._span("validate", exchange.started, max(ended, exchange.started), context)

    def _span(
        self,
        name: str,
        started: int,
        ended: int,
        context: Context,
        attributes: dict[str, AttributeValue] | None = None,
    ) -> None:
        span = self._tracer.start_span(
            name, context=context, start_time=started, attributes=attributes
        )
        span.end(max(started, ended))

    @staticmethod
    def _prefill(answer: Answer) -> dict[str, AttributeValue]:
        return {
            "gen_ai.usage.input_tokens": len(answer.request.prompt_ids),
            "gen_ai.usage.cache_read.input_tokens": answer.num_cached_tokens,
        }

    @staticmethod
    def _decode(answer: Answer) -> dict[str, AttributeValue]:
        return {"gen_ai.usage.output_tokens": len(answer.output_ids)}

    @staticmethod
    def _asked(answer: Answer) -> dict[str, AttributeValue]:
        sampling = answer.request.sampling
        asked: dict[str, AttributeValue] = {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.latency.time_to_first_token": answer.first_token_time,
            "gen_ai.latency.time_in_queue": answer.queue_time,
        }
        if sampling.stop:
            asked["gen_ai.request.stop_sequences"] = list(sampling.stop)
        return asked
