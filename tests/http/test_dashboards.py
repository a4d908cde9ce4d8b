"""Every query of the dashboard and the alert rules, run by Prometheus against a live server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.live import LiveServer, wait_until

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "tgi.json").read_text())
ALERTS = DOCS / "prometheus" / "alerts.yml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{p['title']}: {t['legendFormat']}": t["expr"] for p in PANELS for t in p["targets"]}

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


def for_prometheus(query: str) -> str:
    """The query with Grafana's variables filled in as Grafana would."""
    query = query.replace("$__rate_interval", "30s").replace("$instance", ".*")
    assert "$" not in query, query
    return query


class Prometheus:
    """A Prometheus that scrapes one server, in a folder of its own."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n"
            f"rule_files: [{ALERTS}]\n"
            "scrape_configs:\n- job_name: tgi\n"
            f"  static_configs: [{{targets: ['{target}']}}]\n"
        )
        subprocess.run(["promtool", "check", "config", config], check=True, capture_output=True)
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
                "--log.level=error",
            ]
        )

    def get(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def query(self, query: str) -> list[Any]:
        found: list[Any] = self.get("/api/v1/query", query=for_prometheus(query))["result"]
        return found

    def ready(self) -> bool:
        try:
            return len(self.query("count_over_time(tgi_request_success[1m]) > 4")) > 0
        except OSError:
            return False


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]
) -> Iterator[Prometheus]:
    """It has seen a server before, during and after it was used."""
    with LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server:
        found = Prometheus(tmp_path_factory.mktemp("prom"), server.url.removeprefix("http://"))
        try:
            for _ in range(5):
                assert (
                    server.post("/v1/completions", {"prompt": "one two", "max_tokens": 9})[0] == 200
                )
                assert server.post("/generate", {"inputs": ""})[0] == 422
                time.sleep(0.3)
            wait_until(found.ready)
            server.post("/v1/completions", {"prompt": "one two", "max_tokens": 9})
            assert server.post("/generate", {"inputs": ""})[0] == 422
            before = found.query("max(timestamp(tgi_request_success))")[0]["value"][1]
            wait_until(
                lambda: (
                    float(found.query("max(timestamp(tgi_request_success))")[0]["value"][1])
                    > float(before) + 2
                )
            )
            yield found
        finally:
            found.process.terminate()
            found.process.wait(20)


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_of_the_dashboard_finds_something(prometheus: Prometheus, name: str) -> None:
    result = prometheus.query(QUERIES[name])
    assert result, QUERIES[name]
    for series in result:
        assert re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|NaN", series["value"][1])


def test_every_alert_reads_metrics_that_exist(prometheus: Prometheus) -> None:
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True, capture_output=True)
    [group] = prometheus.get("/api/v1/rules")["groups"]
    assert len(group["rules"]) > 5
    for rule in group["rules"]:
        assert rule["health"] in ("ok", "unknown"), rule
        for metric in re.findall(r"\btgi_\w+", rule["query"]):
            assert prometheus.query(metric), metric


def test_the_server_is_healthy_in_its_own_eyes(prometheus: Prometheus) -> None:
    assert prometheus.query("tgi_engine_ready")[0]["value"][1] == "1"
    firing = prometheus.get("/api/v1/alerts")["alerts"]
    assert not [alert for alert in firing if alert["labels"]["alertname"] == "TgiNotReady"]


def test_an_alert_fires_when_it_should(tmp_path: Path) -> None:
    scenario = tmp_path / "test.yml"
    scenario.write_text(
        f"rule_files: [{ALERTS}]\n"
        "tests:\n"
        "- interval: 1m\n"
        "  input_series:\n"
        "  - {series: 'tgi_engine_ready{instance=\"a\"}', values: '0x20'}\n"
        "  - {series: 'tgi_engine_ready{instance=\"b\"}', values: '1x20'}\n"
        "  - {series: 'tgi_kv_blocks_used{instance=\"a\"}', values: '99x20'}\n"
        "  - {series: 'tgi_kv_blocks_total{instance=\"a\"}', values: '100x20'}\n"
        "  alert_rule_test:\n"
        "  - eval_time: 6m\n"
        "    alertname: TgiNotReady\n"
        "    exp_alerts:\n"
        "    - exp_labels: {severity: critical, instance: a}\n"
        "      exp_annotations:\n"
        "        summary: a has had no engine ready for 5 minutes; /health says why\n"
        "  - eval_time: 11m\n"
        "    alertname: TgiKvCacheFull\n"
        "    exp_alerts:\n"
        "    - exp_labels: {severity: warning, instance: a}\n"
        "      exp_annotations:\n"
        "        summary: the KV cache of a has been over 95 % full for 10 minutes\n"
    )
    done = subprocess.run(
        ["promtool", "test", "rules", scenario], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
