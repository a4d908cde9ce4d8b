"""The supervisor's parts that need no server."""

from __future__ import annotations

import socket

import pytest

from tgi_cli.engine.control import how_it_ended
from tgi_cli.engine.messages import Failed
from tgi_cli.errors import EngineError, OutOfMemory, TgiError, UsageError
from tgi_cli.serve.supervisor import RestartBudget, error_of, listen


def test_restart_budget_counts_within_its_window() -> None:
    now = 0.0
    budget = RestartBudget(2, 10.0, lambda: now)
    assert budget.take()
    now = 6.0
    assert budget.take()
    assert not budget.take()
    now = 10.5  # the first one is forgotten
    assert budget.take()
    assert not budget.take()
    assert not RestartBudget(0, 10.0).take()


def test_a_reported_failure_keeps_its_kind() -> None:
    error = error_of(Failed(error="OutOfMemory", message="too big", hint="smaller"))
    assert type(error) is OutOfMemory
    assert (error.message, error.hint) == ("too big", "smaller")
    for name in ("RuntimeError", "Overloaded", "annotations", "TgiError"):
        assert type(error_of(Failed(error=name, message="odd"))) is EngineError


def test_how_it_ended() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-9) == "was killed by SIGKILL"
    assert how_it_ended(-99) == "was killed by signal 99"


def test_listen() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port != 0
        with pytest.raises(TgiError, match=f"port {port} on 127.0.0.1 is already in use") as taken:
            listen("127.0.0.1", port)
        assert taken.value.hint is not None
        assert "--port 0" in taken.value.hint


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("no such host", 0), ("::1", -1)])
def test_listen_on_nonsense(host: str, port: int) -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        listen(host, port)


def test_listen_opens_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        pass
