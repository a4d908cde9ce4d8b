"""One logging set-up: stderr, plain lines or JSON. Called once per process by its entry point."""

from __future__ import annotations

import logging
import sys
from typing import Any

import orjson


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in the field names TGI's `--json-output` used."""

    def format(self, record: logging.LogRecord) -> str:
        """Render timestamp, level, target and message, with the traceback if there is one."""
        entry: dict[str, Any] = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "target": record.name,
            "fields": {"message": record.getMessage()},
        }
        if record.exc_info:
            entry["fields"]["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


def configure(level: str = "INFO", *, json_logs: bool = False) -> None:
    """Send this process's log to stderr at `level`; repeated calls replace the earlier set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if json_logs
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
