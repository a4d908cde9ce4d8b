"""The shapes in which errors leave: OpenAI's under `/v1`, Anthropic's, TGI's everywhere else.

Walks the class attributes drawn in `tgi_cli.errors`; knows neither aiohttp nor any route beyond
its prefix.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import orjson

from tgi_cli.errors import EngineError, RequestError, TgiError

_HTTP_CODES = {
    400: "invalid_json",
    404: "unknown_url",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
}


class Surface(Protocol):
    """How one API words a failure."""

    def error(self, error: TgiError) -> tuple[int, dict[str, Any]]:
        """Status and body of a known failure."""
        ...

    def refusal(self, status: int, message: str) -> dict[str, Any]:
        """Body of what HTTP itself refuses, and of a 500 that nobody foresaw."""
        ...

    def event(self, error: TgiError) -> bytes:
        """The server-sent event that ends a stream which has already begun."""
        ...


def sentence(error: TgiError) -> str:
    """The message, with its way out when there is one."""
    return f"{error.message} (hint: {error.hint})" if error.hint else error.message


class OpenAISurface:
    """OpenAI's `error` object of `message`, `type`, `param` and `code`."""

    def error(self, error: TgiError) -> tuple[int, dict[str, Any]]:
        """Status and body of a known failure."""
        if isinstance(error, RequestError):
            return error.status, self._body(
                sentence(error), error.openai_type, error.code, error.param
            )
        if isinstance(error, EngineError):
            return error.status, self._body(sentence(error), error.openai_type, error.code)
        return 500, self._body(sentence(error), "server_error", "internal_error")

    def refusal(self, status: int, message: str) -> dict[str, Any]:
        """Body of what HTTP itself refuses."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return self._body(message, kind, _HTTP_CODES.get(status))

    def event(self, error: TgiError) -> bytes:
        """The error object as the stream's last event."""
        return b"data: " + orjson.dumps(self.error(error)[1]) + b"\n\n"

    @staticmethod
    def _body(
        message: str, kind: str, code: str | None = None, param: str | None = None
    ) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class AnthropicSurface:
    """Anthropic's `{"type": "error", "error": {"type", "message"}}`; a full server is 429."""

    _KINDS: Final = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }

    def error(self, error: TgiError) -> tuple[int, dict[str, Any]]:
        """Status and body of a known failure."""
        status = error.status if isinstance(error, RequestError | EngineError) else 500
        return status, self.refusal(status, sentence(error))

    def refusal(self, status: int, message: str) -> dict[str, Any]:
        """Body for any status."""
        other = "invalid_request_error" if status < 500 else "api_error"
        kind = self._KINDS.get(status, other)
        return {"type": "error", "error": {"type": kind, "message": message}}

    def event(self, error: TgiError) -> bytes:
        """The body as an event named `error`."""
        return b"event: error\ndata: " + orjson.dumps(self.error(error)[1]) + b"\n\n"


class TgiSurface:
    """TGI's `{"error", "error_type"}`."""

    _PREFIXES: Final = {
        "validation": "Input validation error: ",
        "template_error": "Template error: ",
        "generation": "Request failed during generation: ",
    }
    _HTTP_TYPES: Final = {404: "not_found", 405: "method_not_allowed", 500: "internal"}

    def error(self, error: TgiError) -> tuple[int, dict[str, Any]]:
        """Status and body of a known failure."""
        text = sentence(error)
        if isinstance(error, RequestError):
            prefix = self._PREFIXES.get(error.tgi_type, "")
            return error.tgi_status, {"error": prefix + text, "error_type": error.tgi_type}
        if isinstance(error, EngineError):
            return error.status, {"error": text, "error_type": error.tgi_type}
        return 500, {"error": text, "error_type": "internal"}

    def refusal(self, status: int, message: str) -> dict[str, Any]:
        """Body of what HTTP itself refuses."""
        return {"error": message, "error_type": self._HTTP_TYPES.get(status, "validation")}

    def event(self, error: TgiError) -> bytes:
        """The body as the stream's last event."""
        return b"data: " + orjson.dumps(self.error(error)[1]) + b"\n\n"


OPENAI: Final = OpenAISurface()
ANTHROPIC: Final = AnthropicSurface()
TGI: Final = TgiSurface()


def surface_of(path: str) -> Surface:
    """The surface that a path belongs to."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    return OPENAI if path == "/v1" or path.startswith("/v1/") else TGI
