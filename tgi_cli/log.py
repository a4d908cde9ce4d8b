"""One logging set-up: stderr, plain lines or JSON. Called once per process by its entry point."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any

import orjson

#: The id of the HTTP request being answered; every record written meanwhile carries it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
#: Attribute of a record (`extra={FIELDS: {...}}`) whose entries become JSON fields of their own.
FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in the field names TGI's `--json-output` used."""

    def format(self, record: logging.LogRecord) -> str:
        """Render timestamp, level, target, message and request id, and a traceback if any."""
        entry: dict[str, Any] = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "target": record.name,
            "fields": {"message": record.getMessage(), **getattr(record, FIELDS, {})},
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            entry["request_id"] = request_id
        if record.exc_info:
            entry["fields"]["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


class LineFormatter(logging.Formatter):
    """Plain lines; those written while a request is answered name it in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, with the request's id if there is one."""
        line = super().formatMessage(record)
        request_id = REQUEST_ID.get()
        return line if request_id is None else f"{line} [{request_id}]"


def configure(level: str = "INFO", *, json_logs: bool = False) -> None:
    """Send this process's log to stderr at `level`; repeated calls replace the earlier set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_logs else LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
