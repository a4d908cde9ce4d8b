"""The queue bound: refusals come at once and say when to come back."""

from __future__ import annotations

import asyncio

import pytest

from tests.http.conftest import Serve
from tests.http.scripted import byte_facts
from tests.http.test_streams import until
from tgi_cli.config import ServerConfig
from tgi_cli.errors import ContextLengthExceeded, InvalidRequest, Overloaded, UsageError
from tgi_cli.serve.limits import Admission, Limits

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_retry_after_follows_the_service_rate() -> None:
    clock = Clock()
    admission = Admission(2, clock)
    for _ in range(4):  # one departure every 3 seconds
        with admission.permits(1):
            clock.now += 3
    with admission.permits(2):
        with pytest.raises(Overloaded) as refusal, admission.permits(1):
            pytest.fail("was let in")
        assert refusal.value.retry_after == 3
        with pytest.raises(Overloaded) as refusal, admission.permits(2):
            pytest.fail("was let in")
        assert refusal.value.retry_after == 5
    assert admission.in_use == 0


def test_retry_after_without_departures() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    with admission.permits(1):
        assert admission.retry_after(1) == 1
        clock.now += 7.5
        assert admission.retry_after(1) == 8
        clock.now += 1000
        assert admission.retry_after(1) == 60


def test_more_than_the_house_holds_is_not_overload() -> None:
    with pytest.raises(InvalidRequest, match=r"at most 2 .* Given: 3"), Admission(2).permits(3):
        pytest.fail("was let in")


def test_permits_are_returned_on_failure() -> None:
    admission = Admission(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.permits(1):
            raise ZeroDivisionError
    assert admission.in_use == 0


def test_limits_from_flags_and_model() -> None:
    facts = byte_facts("", max_model_len=512)
    assert Limits.resolve(ServerConfig(), facts).max_input_tokens == 511
    limits = Limits.resolve(ServerConfig(max_total_tokens=100, max_input_tokens=50), facts)
    assert (limits.max_input_tokens, limits.max_total_tokens) == (50, 100)
    with pytest.raises(UsageError, match="513 is more than the 512"):
        Limits.resolve(ServerConfig(max_total_tokens=513), facts)
    with pytest.raises(UsageError, match="512 must be less than the 512"):
        Limits.resolve(ServerConfig(max_input_tokens=512), facts)


def test_max_tokens_at_the_edges() -> None:
    limits = Limits(max_input_tokens=99, max_total_tokens=100)

    def ask(length: int, asked: int | None) -> int:
        return limits.max_tokens(length, asked, prompt_field="p", tokens_field="t")

    assert ask(99, None) == 1
    assert ask(99, 1) == 1
    assert ask(1, 99) == 99
    for length, asked in ((99, 2), (100, None), (1, 100)):
        with pytest.raises(ContextLengthExceeded):
            ask(length, asked)


@pytest.mark.parametrize("path", [CHAT, "/generate"])
async def test_overload_over_http(serve: Serve, path: str) -> None:
    site = await serve(max_concurrent_requests=2)
    body = HELLO if path == CHAT else {"inputs": "Hi"}
    site.engine.gate.clear()
    held = [asyncio.create_task(site.post(path, body)) for _ in range(2)]
    await until(lambda: site.engine.running == 2)
    status, refusal, headers = await site.post(path, body)
    assert status == 429
    assert int(headers["Retry-After"]) >= 1
    if path == CHAT:
        assert refusal["error"]["code"] == "rate_limit_exceeded"
    else:
        assert refusal["error_type"] == "overloaded"
    site.engine.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*held)] == [200, 200]
    status, _, _ = await site.post(path, body)
    assert status == 200
