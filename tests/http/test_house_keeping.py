"""Health, keys, CORS, metrics, and what the HTTP process must not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.http.conftest import Serve, Site
from tgi_cli.engine.messages import EngineStats, Heartbeat
from tgi_cli.serve import keys
from tgi_cli.serve.keys import DOOR, PULSE

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
async def test_health_says_what_it_is_doing(site: Site, path: str) -> None:
    async with site.session.get(path) as response:
        assert (response.status, await response.read()) == (200, b"")
    for state in ("downloading 41 %", "restarting: killed by SIGKILL"):
        site.engine.state = state
        async with site.session.get(path) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert await response.json() == {"error": state, "error_type": "healthcheck"}


async def test_requests_before_readiness(serve: Serve) -> None:
    site = await serve(opened=False)
    site.engine.state = "downloading 41 %"
    for path, body in (
        (CHAT, HELLO),
        ("/generate", {"inputs": "a"}),
        ("/tokenize", {"inputs": "a"}),
    ):
        status, answer, headers = await site.post(path, body)
        assert status == 503
        assert "downloading 41 %" in str(answer)
        assert int(headers["Retry-After"]) >= 1
    async with site.session.get("/info") as response:
        assert response.status == 503
    async with site.session.get("/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "org/bytes"
    site.engine.state = "ready"
    async with site.session.get("/health") as response:
        assert (await response.json())["error"] == "loading the tokenizer"


async def test_silent_engine_is_not_healthy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "HEARTBEAT_PATIENCE", 0.0)
    async with site.session.get("/health") as response:
        assert response.status == 503
        assert "silent" in (await response.json())["error"]
    monkeypatch.undo()
    site.app[PULSE].beat(Heartbeat(num_steps=1, step_age=2.5, has_work=True))
    async with site.session.get("/health") as response:
        assert response.status == 200
    assert (await site.metrics())["tgi_engine_step_age_seconds"] == 2.5


async def test_draining_refuses(site: Site) -> None:
    site.app[DOOR].draining = True
    status, body, _ = await site.post(CHAT, HELLO)
    assert status == 503
    assert "shutting down" in body["error"]["message"]


async def test_api_key(serve: Serve) -> None:
    site = await serve(api_key="sesame")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        for path, body in ((CHAT, HELLO), ("/generate", {"inputs": "a"}), ("/", {"inputs": "a"})):
            status, answer, answered = await site.post(path, body, headers=headers)
            assert status == 401
            assert answered["WWW-Authenticate"] == "Bearer"
            if path == CHAT:
                assert answer["error"]["code"] == "invalid_api_key"
            else:
                assert answer["error_type"] == "unauthorized"
    status, _, _ = await site.post(CHAT, HELLO, headers={"Authorization": "bearer sesame"})
    assert status == 200
    assert site.engine.requests[-1].tenant == "default"
    for path in ("/", "/health", "/info", "/metrics", "/v1/models", "/v1/models/org/bytes"):
        async with site.session.get(path) as response:
            assert response.status == 200, path
    status, _, _ = await site.post("/chat_tokenize", HELLO)
    assert status == 200
    async with site.session.get("/nothing") as response:
        assert response.status == 404


async def test_cors(serve: Serve) -> None:
    preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    anyone = await serve()
    async with anyone.session.options(CHAT, headers=preflight) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "authorization" in response.headers["Access-Control-Allow-Headers"]
    one = await serve(cors_allow_origin=("http://b.example",))
    async with one.session.options(CHAT, headers=preflight) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
    for body in (HELLO, {}, {**HELLO, "stream": True}):
        async with one.session.post(
            CHAT, json=body, headers={"Origin": "http://b.example"}
        ) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "http://b.example"
            await response.read()


async def test_metrics(site: Site) -> None:
    await site.post(CHAT, HELLO)
    await site.post("/generate", {"inputs": ""})
    site.engine.stats = EngineStats(
        num_waiting=3, kv_blocks_used=7, kv_blocks_total=256, prefix_hit_tokens=5, preemptions=2,
        draft_tokens=9, accepted_draft_tokens=6, verifications=3,
    )  # fmt: skip
    metrics = await site.metrics()
    assert metrics["tgi_request_count"] == 2
    assert metrics["tgi_request_success"] == 1
    assert metrics['tgi_request_failure{err="validation"}'] == 1
    assert metrics["tgi_request_duration_count"] == 1
    assert metrics["tgi_request_time_to_first_token_duration_count"] == 1
    assert metrics["tgi_request_inter_token_duration_count"] == 12
    assert metrics["tgi_request_queue_duration_sum"] == 0.25
    assert metrics['tgi_request_generated_tokens_bucket{le="15.36"}'] == 1
    assert metrics["tgi_queue_size"] == 3
    assert metrics["tgi_kv_blocks_used"] == 7
    assert metrics["tgi_prefix_cache_hit_tokens_total"] == 5
    assert metrics["tgi_preemptions_total"] == 2
    assert metrics["tgi_draft_tokens_total"] == 9
    assert metrics["tgi_request_skipped_tokens_sum"] == 6
    assert metrics["tgi_request_skipped_tokens_count"] == 3
    assert metrics["tgi_http_requests_in_flight"] == 1  # this very scrape


async def test_metrics_name_the_worker(serve: Serve) -> None:
    site = await serve(http_workers=2)
    metrics = await site.metrics()
    assert metrics['tgi_request_count{worker="0"}'] == 0
    assert all('worker="0"' in name for name in metrics)


@pytest.mark.parametrize("module", ["app", "worker", "supervisor"])
def test_no_torch_in_the_http_process(module: str) -> None:
    code = (
        f"import sys, tgi_cli.serve.{module}\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
