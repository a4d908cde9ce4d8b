"""Where spans go: OTLP over gRPC, as TGI sends them, or over HTTP, as `--otlp-protocol` says.

Imports of the optional packages happen when they are needed; `check_extra` says early, and in
words, that they are missing. Headers, certificates, sampling: the SDK's own `OTEL_*` variables.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from tgi_cli.config import ServerConfig
from tgi_cli.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

GRPC = "grpc"

_TRACES_PATH = "/v1/traces"
_MODULES = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
}


def check_extra(config: ServerConfig) -> None:
    """Raise `UsageError` if traces are asked for and cannot be sent."""
    if config.otlp_endpoint is None:
        return
    for module in ("opentelemetry.sdk", _MODULES[config.otlp_protocol]):
        if not _present(module):
            raise UsageError(
                f"--otlp-endpoint needs the Python package {module}, which is not installed",
                hint="pip install 'tgi-cli[otel]'",
            )
    if not urlsplit(_with_scheme(config.otlp_endpoint)).hostname:
        raise UsageError(
            f"--otlp-endpoint is {config.otlp_endpoint!r} but must be a URL",
            hint="for example http://localhost:4317 (gRPC) or http://localhost:4318 (HTTP)",
        )


def make_exporter(config: ServerConfig) -> SpanExporter:
    """An exporter to `--otlp-endpoint`; it connects when the first spans are sent."""
    assert config.otlp_endpoint is not None
    endpoint = _with_scheme(config.otlp_endpoint)
    if config.otlp_protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpSpanExporter,
    )

    parts = urlsplit(endpoint)
    if parts.path in ("", "/"):
        endpoint = urlunsplit(parts._replace(path=_TRACES_PATH))
    return HttpSpanExporter(endpoint=endpoint)


def _with_scheme(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
