"""Traces, received by a collector made of OpenTelemetry's own messages, over both transports."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.http.conftest import Serve, Site
from tgi_cli.config import ServerConfig
from tgi_cli.errors import UsageError
from tgi_cli.serve import telemetry_exporter

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["zzz"],
}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every request it gets, and gives its spans by name."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    async def over_http(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        message = trace_service_pb2.ExportTraceServiceRequest()
        message.ParseFromString(await request.read())
        answer = self.Export(message, None)
        return web.Response(body=answer.SerializeToString(), content_type="application/x-protobuf")

    def spans(self, name: str) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name == name
        ]

    def resource(self) -> dict[str, str]:
        attributes = self.requests[0].resource_spans[0].resource.attributes
        return {a.key: a.value.string_value for a in attributes}


def attributes(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        if kind == "array_value":
            value = [each.string_value for each in value.values]
        found[attribute.key] = value
    return found


@pytest.fixture(params=["grpc", "http/protobuf"])
async def collector(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Collector, str]]:
    found = Collector()
    if request.param == "grpc":
        server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        found.endpoint = f"http://127.0.0.1:{port}"
        yield found, request.param
        await asyncio.to_thread(server.stop(None).wait)
        return
    app = web.Application()
    app.add_routes([web.post("/v1/traces", found.over_http)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found, request.param
    await runner.cleanup()


@pytest.fixture
async def traced(serve: Serve, collector: tuple[Collector, str]) -> Site:
    found, protocol = collector
    return await serve(otlp_endpoint=found.endpoint, otlp_protocol=protocol)


async def sent(site: Site) -> None:
    """Wait until all spans made so far have arrived."""
    await site.session.close()
    await asyncio.wait_for(site.app.cleanup(), 20)


async def test_spans_of_a_chat(traced: Site, collector: tuple[Collector, str]) -> None:
    headers = {"traceparent": PARENT, "x-request-id": "abc-1"}
    status, _, answered = await traced.post(CHAT, HELLO, headers=headers)
    assert status == 200
    received = collector[0]
    await sent(traced)
    assert received.resource()["service.name"] == "text-generation-inference.router"
    [server] = received.spans(f"POST {CHAT}")
    assert server.kind == Span.SPAN_KIND_SERVER
    assert server.trace_id.hex() == PARENT.split("-")[1]
    assert server.parent_span_id.hex() == PARENT.split("-")[2]
    assert answered["traceparent"].split("-")[1:3] == [server.trace_id.hex(), server.span_id.hex()]
    said = attributes(server)
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tgi",
        "gen_ai.request.model": "org/bytes",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stop_sequences": ["zzz"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.input_tokens": len(traced.engine.requests[0].prompt_ids),
        "gen_ai.response.finish_reasons": ["length"],
        "tgi.request_id": "abc-1",
    }
    assert {name: said.get(name) for name in expected} == expected
    parts = [received.spans(name) for name in ("validate", "queue", "prefill", "decode")]
    assert [len(found) for found in parts] == [1, 1, 1, 1]
    for [span] in parts:
        assert span.parent_span_id == server.span_id
        assert span.trace_id == server.trace_id
    validate, queue, prefill, decode = (found[0] for found in parts)
    assert validate.start_time_unix_nano == server.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= server.end_time_unix_nano
    assert attributes(prefill)["gen_ai.usage.cache_read.input_tokens"] == 3


async def test_streams_choices_and_refusals(traced: Site, collector: tuple[Collector, str]) -> None:
    await traced.stream(CHAT, {**HELLO, "stream": True, "n": 2})
    status, _, _ = await traced.post("/generate", {"inputs": ""})
    assert status == 422
    traced.engine.fail_after = 2
    events = await traced.stream("/v1/completions", {"prompt": "a", "stream": True})
    assert "error" in events[-1]
    async with traced.session.get("/health") as answer:
        assert "traceparent" not in answer.headers
    received = collector[0]
    await sent(traced)
    [chat] = received.spans(f"POST {CHAT}")
    assert attributes(chat)["gen_ai.usage.output_tokens"] == 10
    assert attributes(chat)["gen_ai.usage.input_tokens"] == len(
        traced.engine.requests[0].prompt_ids
    )
    assert len([s for s in received.spans("decode") if s.trace_id == chat.trace_id]) == 2
    [refused] = received.spans("POST /generate")
    assert attributes(refused)["http.response.status_code"] == 422
    assert refused.status.code == 0
    below = [s.name for s in all_spans(received) if s.parent_span_id == refused.span_id]
    assert below == ["validate"]
    [broken] = received.spans("POST /v1/completions")
    assert broken.status.code == 2
    assert attributes(broken)["gen_ai.operation.name"] == "text_completion"
    assert len({span.trace_id for span in (chat, refused, broken)}) == 3


def all_spans(collector: Collector) -> list[Span]:
    names = ("validate", "queue", "prefill", "decode")
    return [span for name in names for span in collector.spans(name)]


async def test_a_collector_that_is_away_costs_nobody_anything(serve: Serve) -> None:
    site = await serve(otlp_endpoint="http://127.0.0.1:9", otlp_protocol="http/protobuf")
    assert (await site.post(CHAT, HELLO))[0] == 200


def test_a_missing_extra_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_exporter, "find_spec", lambda name: None)
    telemetry_exporter.check_extra(ServerConfig())
    with pytest.raises(UsageError, match=r"opentelemetry\.sdk") as refused:
        telemetry_exporter.check_extra(ServerConfig(otlp_endpoint="http://localhost:4317"))
    assert refused.value.hint == "pip install 'tgi-cli[otel]'"


def test_a_wrong_endpoint_is_refused() -> None:
    telemetry_exporter.check_extra(ServerConfig(otlp_endpoint="localhost:4317"))
    with pytest.raises(UsageError, match="must be a URL"):
        telemetry_exporter.check_extra(ServerConfig(otlp_endpoint="http://"))


def test_nothing_is_imported_without_an_endpoint() -> None:
    code = "import sys, tgi_cli.serve.worker; print('opentelemetry' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
