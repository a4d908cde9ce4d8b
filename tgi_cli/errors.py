"""Every failure this project raises on purpose, and what each one means outside.

The tree::

    TgiError                      one sentence, an optional hint, an exit code
    ├── UsageError                wrong flags or flag values                       exit 2
    ├── RequestError              ends one request, the server goes on
    │   ├── InvalidRequest        a field or a limit                               400 / 422
    │   │   └── ContextLengthExceeded
    │   ├── TemplateFailed        the chat template refused the messages           400 / 422
    │   ├── Unauthorized          API key missing or wrong                         401
    │   ├── ModelNotFound         no such model or adapter here                    404
    │   ├── ResponseNotFound      no stored response of this id                    404
    │   ├── Overloaded            queue full, try again later                      429
    │   └── GenerationFailed      the engine gave up on this request               500 / 424
    ├── EngineError               ends the engine process (the supervisor restarts it)
    │   ├── EngineUnavailable     not ready yet, restarting or shutting down       503
    │   ├── CheckpointError       weights missing, truncated or inconsistent
    │   ├── UnsupportedModel      architecture, config key or format we don't have
    │   └── OutOfMemory           the memory plan cannot fit
    ├── RemoteError               a server that `chat` or `bench` talks to failed
    └── HubError                  a model could not be fetched
        ├── ModelMissing          no such repository, revision or file
        ├── GatedModel            access must be requested or a token is lacking
        ├── HubOffline            no network, or HF_HUB_OFFLINE
        └── DiskFull

This module does not know HTTP or the terminal: `serve.error_pages` and `cli.app` turn these into
bodies, statuses and exit codes by walking the class's MRO.
"""

from __future__ import annotations


class TgiError(Exception):
    """A known failure: one lower-case sentence with value and limit; `hint` is the way out."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TgiError):
    """Wrong command line: an unknown value, two flags that exclude each other."""

    exit_code = 2


class RequestError(TgiError):
    """Ends one request.

    `status` and `openai_type`/`code` shape the answer of `/v1/*`; `tgi_status` and `tgi_type` that
    of the native routes; `param` names the offending field if there is one.
    """

    status = 400
    openai_type = "invalid_request_error"
    code: str | None = None
    tgi_status = 422
    tgi_type = "validation"

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class InvalidRequest(RequestError):
    """A field of the request has a wrong type or value."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested tokens do not fit into the context or the KV cache."""

    code = "context_length_exceeded"


class TemplateFailed(RequestError):
    """The chat template is missing or raised."""

    tgi_type = "template_error"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    tgi_status = 401
    code = "invalid_api_key"
    tgi_type = "unauthorized"


class ModelNotFound(RequestError):
    """The request names a model or adapter that this server does not serve."""

    status = 404
    tgi_status = 404
    code = "model_not_found"
    tgi_type = "model_not_found"


class ResponseNotFound(RequestError):
    """The request names a stored response that is not, or no longer, kept."""

    status = 404
    tgi_status = 404
    code = "response_not_found"
    tgi_type = "not_found"


class Overloaded(RequestError):
    """The queue is full. `retry_after` is in whole seconds, for the `Retry-After` header."""

    status = 429
    tgi_status = 429
    openai_type = "rate_limit_error"
    code = "rate_limit_exceeded"
    tgi_type = "overloaded"

    def __init__(self, message: str, *, retry_after: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class GenerationFailed(RequestError):
    """The engine failed this one request while running it."""

    status = 500
    tgi_status = 424
    openai_type = "server_error"
    code = "generation_failed"
    tgi_type = "generation"


class EngineError(TgiError):
    """Ends the engine process; every request in flight is affected."""

    status = 503
    openai_type = "server_error"
    code: str | None = "engine_error"
    tgi_type = "unhealthy"


class EngineUnavailable(EngineError):
    """The engine is loading, restarting or shutting down; the message says which."""

    code = "engine_unavailable"


class CheckpointError(EngineError):
    """The weights on disk are missing, truncated or do not fit the configuration."""


class UnsupportedModel(EngineError):
    """An architecture, configuration key or tensor format this build cannot run."""


class OutOfMemory(EngineError):
    """The memory plan does not fit into this machine."""


class RemoteError(TgiError):
    """A server we are a client of refused, failed or vanished.

    `kind` is a short name to count by: `cannot connect`, `timeout`, `http 429`, `cut off`, ...
    """

    def __init__(self, message: str, *, kind: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class HubError(TgiError):
    """A model could not be found or fetched."""


class ModelMissing(HubError):
    """No such repository, revision or file."""


class GatedModel(HubError):
    """The repository asks for an access request or a token."""


class HubOffline(HubError):
    """The hub cannot be reached, or HF_HUB_OFFLINE is set."""


class DiskFull(HubError):
    """The files do not fit on the disk."""
