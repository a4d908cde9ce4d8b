"""Keys from a file, per-key limits, request ids, log lines, and what a browser may do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.errors import Overloaded, UsageError
from tgi_cli.log import FIELDS, JsonFormatter, LineFormatter
from tgi_cli.serve import api_keys
from tgi_cli.serve.api_keys import ApiKeys, hash_of, new_key, read_key_file
from tgi_cli.serve.ledger import Ledger
from tgi_cli.serve.limits import Admission
from tgi_cli.serve.tenants import Tenant, TenantLimits, Tenants

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def write_keys(path: Path, **tenants: str) -> str:
    path.write_text("\n".join(f"[{name}]\n{entry}" for name, entry in tenants.items()))
    return str(path)


def entry(*keys: str, **limits: float) -> str:
    listed = json.dumps([hash_of(key) for key in keys])
    return f"key = {listed}\n" + "".join(f"{name} = {value}\n" for name, value in limits.items())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [100.0]
    monkeypatch.setitem(Tenants.__init__.__kwdefaults__, "clock", lambda: moment[0])
    return moment


async def test_keys_of_a_file_name_tenants_and_are_read_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api_keys, "RELOAD_EVERY", 0.0)
    path = tmp_path / "keys.toml"
    write_keys(path, a=entry("one", "two", weight=2.5), b=entry("three"))
    site = await serve(api_key_file=str(path), api_key="single")
    for key, tenant in (("one", "a"), ("two", "a"), ("three", "b"), ("single", "default")):
        status, _, _ = await site.post(CHAT, HELLO, headers=bearer(key))
        assert (status, site.engine.requests[-1].tenant) == (200, tenant)
    assert [r.weight for r in site.engine.requests] == [2.5, 2.5, 1.0, 1.0]
    status, _, _ = await site.post(CHAT, HELLO, headers={"x-api-key": "three"})
    assert (status, site.engine.requests[-1].tenant) == (200, "b")
    for wrong in ({}, bearer("four"), bearer(hash_of("one")), {"x-api-key": "four"}):
        status, body, _ = await site.post(CHAT, HELLO, headers=wrong)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")

    write_keys(path, a=entry("one"), c=entry("four"))
    assert (await site.post(CHAT, HELLO, headers=bearer("four")))[0] == 200
    assert (await site.post(CHAT, HELLO, headers=bearer("two")))[0] == 401
    path.write_text("nonsense")
    assert (await site.post(CHAT, HELLO, headers=bearer("four")))[0] == 200
    path.unlink()
    assert (await site.post(CHAT, HELLO, headers=bearer("four")))[0] == 200
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2
    assert "not valid" in said[0]
    assert "no such file" in said[1]


async def test_requests_per_minute(serve: Serve, tmp_path: Path, clock: list[float]) -> None:
    keys = write_keys(tmp_path / "k", a=entry("one", requests_per_minute=2), b=entry("two"))
    site = await serve(api_key_file=keys)
    for left in ("1", "0"):
        status, _, headers = await site.post(CHAT, HELLO, headers=bearer("one"))
        assert status == 200
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == left
    status, body, headers = await site.post(CHAT, HELLO, headers=bearer("one"))
    assert status == 429
    assert headers["Retry-After"] == "30"
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in body["error"]["message"]
    status, body, headers = await site.post("/generate", {"inputs": "a"}, headers=bearer("one"))
    assert (status, body["error_type"]) == (429, "overloaded")
    # What costs the engine nothing is not counted, and others are not touched.
    assert (await site.post("/tokenize", {"inputs": "a"}, headers=bearer("one")))[0] == 200
    assert (await site.post(CHAT, HELLO, headers=bearer("two")))[0] == 200
    assert (await site.metrics())['tgi_request_failure{err="overloaded"}'] == 2
    clock[0] += 30
    assert (await site.post(CHAT, HELLO, headers=bearer("one")))[0] == 200
    assert (await site.post(CHAT, HELLO, headers=bearer("one")))[0] == 429


async def test_tokens_per_minute(serve: Serve, tmp_path: Path, clock: list[float]) -> None:
    keys = write_keys(tmp_path / "k", a=entry("one", tokens_per_minute=60))
    site = await serve(api_key_file=keys)
    ask = {"inputs": "x" * 100, "parameters": {"max_new_tokens": 5}}
    assert (await site.post("/generate", ask, headers=bearer("one")))[0] == 200
    status, body, headers = await site.post("/generate", ask, headers=bearer("one"))
    assert status == 429
    used = 100 + 5  # the prompt's bytes and the answer's
    assert f"60 tokens per minute and has used {used}" in body["error"]
    assert int(headers["Retry-After"]) == used - 60 + 1
    clock[0] += used - 60 + 1
    assert (await site.post("/generate", ask, headers=bearer("one")))[0] == 200


async def test_concurrency(serve: Serve, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "k", a=entry("one", concurrency=1))
    site = await serve(api_key_file=keys)
    site.engine.gate.clear()
    first = asyncio.create_task(site.post(CHAT, HELLO, headers=bearer("one")))
    while not site.engine.running:
        await asyncio.sleep(0.01)
    status, body, headers = await site.post(CHAT, HELLO, headers=bearer("one"))
    assert status == 429
    assert "1 requests answered at once" in body["error"]["message"]
    assert int(headers["Retry-After"]) >= 1
    site.engine.gate.set()
    assert (await first)[0] == 200
    assert (await site.post(CHAT, HELLO, headers=bearer("one")))[0] == 200


async def test_a_left_answer_is_paid_for(serve: Serve, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "k", a=entry("one", tokens_per_minute=1000))
    site = await serve(api_key_file=keys)
    site.engine.refuse = "no"
    status, _, _ = await site.post("/generate", {"inputs": "x" * 100}, headers=bearer("one"))
    assert status == 424
    status, _, headers = await site.post("/generate", {"inputs": "b"}, headers=bearer("one"))
    assert int(headers["x-ratelimit-remaining-tokens"]) <= 900 + 2  # and what came back meanwhile


def test_workers_count_together() -> None:
    now = [100.0]
    fd = Ledger.create(2)
    limits = {"a": TenantLimits(requests_per_minute=6, tokens_per_minute=100, concurrency=2)}
    first, second = [Tenants(Ledger(fd, worker, 2), clock=lambda: now[0]) for worker in range(2)]
    for tenants in (first, second):
        tenants.limit({"other": TenantLimits(concurrency=1), **limits})
    with first["a"].request(), second["a"].request():
        for tenants in (first, second):
            with pytest.raises(Overloaded, match="2 requests answered at once and has 2"):
                tenants["a"].request().__enter__()
        with second["other"].request():  # a row of its own
            pass
    first["a"].spend(60)
    second["a"].spend(41)
    assert first["a"].headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(Overloaded, match="100 tokens per minute and has used 101"):
        first["a"].request().__enter__()
    now[0] += 3
    for tenants in (second, first, second, first):
        with tenants["a"].request():
            pass
    with pytest.raises(Overloaded, match="6 requests per minute"):
        second["a"].request().__enter__()
    os.close(fd)


def test_a_dead_workers_requests_are_given_back() -> None:
    fd = Ledger.create(2)
    limits = {"a": TenantLimits(requests_per_minute=10, concurrency=2)}
    living, dead = (Tenants(Ledger(fd, worker, 2), clock=lambda: 1.0) for worker in range(2))
    living.limit(limits)
    dead.limit(limits)
    house = Admission(3, ledger=Ledger(fd, 1, 2))
    lost = [dead["a"].request(), house.permits(2)]
    for held in lost:
        held.__enter__()
    with living["a"].request():
        with pytest.raises(Overloaded):
            living["a"].request().__enter__()
        Ledger(fd, 1, 2)  # its successor starts
        with living["a"].request():
            pass
    assert living["a"].headers()["x-ratelimit-remaining-requests"] == "7"  # these stay used
    assert house.in_use == 0
    os.close(fd)


def test_usage_survives_other_limits() -> None:
    tenant = Tenant("a", TenantLimits(tokens_per_minute=100), clock=lambda: 0.0)
    tenant.spend(90)
    tenant.limit(TenantLimits(tokens_per_minute=80))
    with pytest.raises(Overloaded, match="80 tokens per minute and has used 90"):
        tenant.request().__enter__()
    tenant.limit(TenantLimits())
    with tenant.request():
        assert tenant.headers() == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]\nkey = 'sesame'", "never the key"),
        ("[a]\nkey = 'sha256:12'", "64 hexadecimal digits"),
        ("[a]\nkey = 5", "expected `str | array`"),
        ("[a]\nweight = 5", "missing required field `key`"),
        (f"[a]\n{entry('x')}\nlimit = 5", "unknown field `limit`"),
        (f"[a]\n{entry('x', concurrency=0)}", "`concurrency` must be at least 1"),
        (f"[a]\n{entry('x', weight=0.0)}", "`weight` must be > 0"),
        (f"[a]\n{entry('x')}[b]\n{entry('x')}", "have the same key"),
        ("[a", "not valid"),
    ],
)
def test_wrong_key_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_key_file(str(path))
    assert words.lower() in refused.value.message.lower()
    assert "tgi key" in (refused.value.hint or "")
    assert ApiKeys(None, str(path)).tenant("sesame") is None  # and nobody gets in


def test_keys_are_long_and_never_alike() -> None:
    made = {new_key() for _ in range(50)}
    assert len(made) == 50
    assert all(len(key) > 40 for key in made)


async def test_request_id_comes_back(site: Site) -> None:
    for body in (HELLO, {**HELLO, "stream": True}, {}):
        async with site.session.post(CHAT, json=body, headers={"x-request-id": "abc-1"}) as answer:
            assert answer.headers["x-request-id"] == "abc-1"
            await answer.read()
    seen = set()
    for given in (None, "", "two words", "x" * 200):
        headers = {} if given is None else {"x-request-id": given}
        async with site.session.get("/health", headers=headers) as answer:
            seen.add(answer.headers["x-request-id"])
    assert len(seen) == 4
    assert all(len(name) == 32 for name in seen)


async def test_log_lines_carry_the_request_id(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    entries: list[Any] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entries.append(json.loads(JsonFormatter().format(record)))
            lines.append(LineFormatter().format(record))

    logger = logging.getLogger("tgi_cli.access")
    handler = Keep()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "tgi_cli.access"):
            headers = {"x-request-id": "abc-1"}
            await site.post(CHAT, HELLO, headers=headers)
            await site.post("/nothing%0Ahere", {}, headers={"x-request-id": "abc-2"})
            await site.session.get("/health")
    finally:
        logger.removeHandler(handler)
    assert [entry["request_id"] for entry in entries] == ["abc-1", "abc-2"]
    assert entries[0]["target"] == "tgi_cli.access"
    fields = entries[0]["fields"]
    assert fields["message"].startswith(f"POST {CHAT} 200 ")
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", CHAT, 200)
    assert fields["duration_ms"] > 0
    assert entries[1]["fields"]["status"] == 404
    assert all("\n" not in line for line in lines)
    assert lines[0].endswith("[abc-1]")
    assert FIELDS == "fields"


async def test_a_page_may_send_what_its_sdk_sends(site: Site) -> None:
    asked = {
        "Origin": "http://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    async with site.session.options(CHAT, headers=asked) as answer:
        allowed = answer.headers["Access-Control-Allow-Headers"]
        assert "x-stainless-os" in allowed
        assert "authorization" in allowed
    odd = {**asked, "Access-Control-Request-Headers": "a\tb;c"}
    async with site.session.options(CHAT, headers=odd) as answer:
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type"


async def test_routes_under_a_platforms_names(serve: Serve) -> None:
    site = await serve(api_key="k", health_route="/h", predict_route="/p")
    async with site.session.get("/h") as answer:
        assert answer.status == 200
    ask = {"instances": [{"inputs": "a", "parameters": {"max_new_tokens": 3}}]}
    assert (await site.post("/p", ask))[0] == 401
    status, body, _ = await site.post("/p", ask, headers=bearer("k"))
    assert (status, len(body["predictions"])) == (200, 1)
    # A name that is taken keeps its meaning.
    site = await serve(health_route="/ping", predict_route="/generate")
    assert (await site.post("/generate", {"inputs": "a"}))[0] == 200
