"""What handlers find in the application: the front door, the model's name, the engine's pulse."""

from __future__ import annotations

import time

import msgspec
from aiohttp import web

from tgi_cli.engine.messages import Heartbeat
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.prometheus import Metrics

#: An engine that has not sent its once-a-second heartbeat for this long is not healthy.
HEARTBEAT_PATIENCE = 10.0


class Served(msgspec.Struct, frozen=True):
    """The model as clients know it: `name` is reported, `model_id` is understood too."""

    name: str
    model_id: str
    since: int  # Unix seconds


class Pulse:
    """When the engine was last heard of, and how long its current step has been running."""

    def __init__(self) -> None:
        self._heard = time.monotonic()
        self.step_age = 0.0

    def beat(self, heartbeat: Heartbeat) -> None:
        """Take note of a heartbeat."""
        self._heard = time.monotonic()
        self.step_age = heartbeat.step_age

    def reset(self) -> None:
        """Start counting anew: an engine has just become ready."""
        self._heard = time.monotonic()
        self.step_age = 0.0

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard

    @property
    def fresh(self) -> bool:
        """Whether the engine has shown itself lately."""
        return self.silence < HEARTBEAT_PATIENCE


DOOR = web.AppKey("door", FrontDoor)
SERVED = web.AppKey("served", Served)
METRICS = web.AppKey("metrics", Metrics)
PULSE = web.AppKey("pulse", Pulse)
