"""`tgi bench`: statistics, conditions and prompts alone, then whole runs on a scripted server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.scripted_server import ScriptedServer, running
from tests.cli.terminal import Terminal
from tgi_cli.cli.app import load_command
from tgi_cli.cli.bench_result import shown_command
from tgi_cli.cli.conditions import (
    REQUEST_METRICS,
    RUN_METRICS,
    STATISTICS,
    Condition,
    parse_condition,
    show_value,
)
from tgi_cli.cli.load import Load, LoadPlan, RequestRecord
from tgi_cli.cli.openai_client import OpenAIClient
from tgi_cli.cli.prompts import calibrate
from tgi_cli.cli.report import Distribution, remarks, summarize, tables
from tgi_cli.errors import RemoteError, UsageError


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as scripted:
        yield scripted


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TGI_")}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )


def record(index: int = 0, **fields: Any) -> RequestRecord:
    return RequestRecord(index=index, start=float(index), **fields)


# statistics


def test_percentiles_interpolate_between_values() -> None:
    values: list[float | None] = [float(number) for number in range(101)]
    random.Random(1).shuffle(values)
    spread = Distribution.of([*values, None])
    assert spread is not None
    assert (spread.count, spread.min, spread.max, spread.mean) == (101, 0, 100, 50)
    assert (spread.p50, spread.p90, spread.p95, spread.p99) == (50, 90, 95, 99)
    two = Distribution.of([1.0, 2.0])
    assert two is not None
    assert two.p90 == pytest.approx(1.9)
    assert Distribution.of([None]) is None


def test_a_summary_counts_only_what_succeeded() -> None:
    records = [
        record(0, ttft=0.1, e2e=1.1, itl=[0.5, 0.5], prompt_tokens=10, completion_tokens=3),
        record(1, ttft=0.3, e2e=0.3, prompt_tokens=12, completion_tokens=1),
        record(2, ttft=9.0, e2e=9.0, error="http 503", message="busy"),
        record(3, error="http 503"),
        record(4, error="timeout"),
    ]
    slo = parse_condition("--slo", "ttft<=200ms", REQUEST_METRICS)
    summary = summarize(records, duration=2.0, output_tokens=3, slos=[slo])
    assert (summary.completed, summary.failed) == (2, 3)
    assert summary.errors == {"http 503": 2, "timeout": 1}
    assert summary.output_throughput == 2.0
    assert summary.total_throughput == 13.0
    assert summary.request_throughput == 1.0
    assert summary.goodput == 0.5
    assert summary.error_rate == pytest.approx(0.6)
    assert summary.metric("max_ttft") == 0.3
    assert summary.metric("mean_itl") == 0.5
    assert summary.metric("p50_tpot") == 0.5
    assert summary.short_answers == 1
    assert remarks(summary, 10, 3)[0] == "prompts had 10 to 12 tokens, not 10"


def test_every_metric_a_condition_can_name_exists() -> None:
    summary = summarize([record(ttft=0.1, e2e=1.0, itl=[0.1], completion_tokens=2)], duration=1.0)
    for name in RUN_METRICS:
        assert isinstance(summary.metric(name), float), name
    empty = summarize([], duration=1.0)
    assert empty.metric("p99_ttft") is None
    assert empty.metric("error_rate") is None


def test_the_tables_fit_a_narrow_terminal() -> None:
    slow = [record(n, ttft=0.9876, e2e=98.76, itl=[0.5432], completion_tokens=2) for n in range(3)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables(summarize(slow, duration=1.0)))
    shown = console.export_text()
    assert "…" not in shown
    assert shown.count("987.6 ms") == len(STATISTICS)


# conditions


@pytest.mark.parametrize(
    ("text", "metric", "comparison", "limit"),
    [
        ("p99_ttft>500ms", "p99_ttft", ">", 0.5),
        (" mean_e2e >= 1.5 s ", "mean_e2e", ">=", 1.5),
        ("P50_ITL<20ms", "p50_itl", "<", 0.02),
        ("error_rate>1%", "error_rate", ">", 0.01),
        ("output_throughput<100tok/s", "output_throughput", "<", 100),
        ("goodput < 2.5req/s", "goodput", "<", 2.5),
        ("failed!=0", "failed", "!=", 0),
        ("completed<1e3", "completed", "<", 1000),
    ],
)
def test_conditions_are_read_with_their_units(
    text: str, metric: str, comparison: str, limit: float
) -> None:
    read = parse_condition("--fail-if", text, RUN_METRICS)
    assert (read.metric, read.comparison) == (metric, comparison)
    assert read.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("p99_ttft", "is not a condition"),
        ("p99_ttft > fast", "is not a condition"),
        ("p99_ttft>500", "has no unit but p99_ttft is in us or ms or s"),
        ("p99_ttft>5%", "has the unit '%' but"),
        ("error_rate>0.5", "has no unit but error_rate is in %"),
        ("p98_ttft>5ms", "names 'p98_ttft', which is not measured"),
        ("failed>1..2", "not a number"),
        ("", "is not a condition"),
    ],
)
def test_bad_conditions_are_wrong_usage(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_condition("--fail-if", text, RUN_METRICS)


def test_a_condition_on_what_was_not_measured_neither_holds_nor_fails() -> None:
    condition = Condition("p99_ttft>1s", "p99_ttft", ">", 1.0)
    assert condition.holds(2.0) is True
    assert condition.holds(1.0) is False
    assert condition.holds(None) is None
    assert condition.holds(float("nan")) is None


def test_values_are_shown_in_peoples_units() -> None:
    assert show_value("p99_ttft", 0.0123) == "12.3 ms"
    assert show_value("p99_ttft", 2.0) == "2.00 s"
    assert show_value("error_rate", 0.015) == "1.50%"
    assert show_value("output_throughput", 12.34) == "12.3 tok/s"
    assert show_value("goodput", None) == "not measured"


# prompts


def words(text: str) -> int:
    return len(text.split())


def letters(text: str) -> int:
    return len(text)


def halves(text: str) -> int:
    return sum(1 + len(word) // 3 for word in text.split())


@pytest.mark.parametrize("length", [1, 7, 128, 1000])
@pytest.mark.parametrize(("tokens", "added"), [(words, 0), (words, 30), (halves, 5)])
async def test_prompts_have_the_wanted_length_in_every_order(
    length: int, tokens: Any, added: int
) -> None:
    calls = 0

    async def count(text: str) -> int:
        nonlocal calls
        calls += 1
        return int(tokens(text)) + added

    if length <= added:
        with pytest.raises(UsageError, match="tokens for a single word"):
            await calibrate(count, length, seed=3)
        return
    prompts = await calibrate(count, length, seed=3)
    assert prompts.num_tokens == length
    assert {await count(prompts.prompt(index)) for index in range(20)} == {length}
    assert prompts.prompt(5) == prompts.prompt(5)
    if length > 10:
        assert len({prompts.prompt(index) for index in range(20)}) == 20
    assert calls < 35


async def test_prompts_come_close_where_exact_is_impossible() -> None:
    async def count(text: str) -> int:
        return letters(text) // 2 * 2  # only even numbers

    prompts = await calibrate(count, 101, seed=0)
    assert abs(prompts.num_tokens - 101) == 1

    async def silent(text: str) -> int:
        return 0

    with pytest.raises(RemoteError, match="no prompt tokens"):
        await calibrate(silent, 10, seed=0)


# load


async def run_load(server: ScriptedServer, plan: LoadPlan, tokens: int = 4) -> Load:
    def body(index: int) -> dict[str, Any]:
        return {
            "prompt": f"prompt {index}",
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }

    async with OpenAIClient(server.url) as client:
        load = Load(client, plan, "/v1/completions", body)
        await load.run()
    return load


async def test_a_closed_loop_sends_every_request_once_and_measures_the_delays(
    server: ScriptedServer,
) -> None:
    server.first_delay, server.delay = 0.05, 0.02
    load = await run_load(server, LoadPlan(concurrency=3, requests=7))
    assert sorted(record.index for record in load.records) == list(range(7))
    assert {body["prompt"] for body in server.requests} == {f"prompt {i}" for i in range(7)}
    for seen in load.records:
        assert seen.error is None
        assert (seen.prompt_tokens, seen.completion_tokens) == (2, 4)
        assert seen.ttft is not None
        assert seen.e2e is not None
        assert seen.ttft >= 0.05
        assert len(seen.itl) == 3
        assert sum(seen.itl) >= 0.9 * 3 * 0.02
        assert seen.e2e >= seen.ttft + sum(seen.itl) - 1e-9
    assert load.in_flight == 0
    # Three clients: the fourth request cannot start before the first one ends.
    starts = sorted(record.start for record in load.records)
    ends = sorted(record.start + (record.e2e or 0) for record in load.records)
    assert starts[3] >= ends[0] - 1e-3
    assert load.span == pytest.approx(ends[-1])


async def test_an_open_loop_does_not_wait_for_answers(server: ScriptedServer) -> None:
    server.first_delay = 0.4
    plan = LoadPlan(concurrency=None, rate=100.0, requests=20, seed=5)
    load = await run_load(server, plan, tokens=1)
    arrivals = random.Random(5)
    planned, moment = [], 0.0
    for _ in range(20):
        moment += arrivals.expovariate(100.0)
        planned.append(moment)
    starts = [record.start for record in sorted(load.records, key=lambda record: record.index)]
    assert starts == pytest.approx(planned)
    ends = [record.start + (record.e2e or 0) for record in load.records]
    assert planned[-1] < min(ends)  # all had arrived before the first was answered


async def test_latency_counts_from_the_planned_arrival(server: ScriptedServer) -> None:
    server.first_delay = 0.1
    plan = LoadPlan(concurrency=1, rate=1000.0, requests=4)
    load = await run_load(server, plan, tokens=1)
    ttfts = sorted(record.ttft or 0 for record in load.records)
    assert ttfts[3] >= 0.35  # the last one queued behind three others
    assert max(record.lag for record in load.records) >= 0.25


async def test_duration_ends_a_load_by_itself(server: ScriptedServer) -> None:
    load = await run_load(server, LoadPlan(concurrency=2, duration=0.2))
    assert load.records
    assert all(record.start < 0.2 for record in load.records)
    load = await run_load(server, LoadPlan(concurrency=None, rate=50.0, duration=0.2))
    assert all(record.start < 0.2 for record in load.records)


async def test_faults_are_counted_by_kind_and_the_load_goes_on(server: ScriptedServer) -> None:
    server.fail_every = 2
    load = await run_load(server, LoadPlan(concurrency=1, requests=4))
    assert [record.error for record in load.records] == [None, "http 503", None, "http 503"]
    server.fail_every, server.break_after = 0, 1
    load = await run_load(server, LoadPlan(concurrency=1, requests=2))
    assert [record.error for record in load.records] == ["cut off", "cut off"]
    server.break_after, server.delay = None, 5.0
    load = await run_load(server, LoadPlan(concurrency=1, requests=1, timeout=0.2))
    assert [record.error for record in load.records] == ["timeout"]


async def test_stopping_keeps_what_was_finished(server: ScriptedServer) -> None:
    server.delay = 5.0

    def body(index: int) -> dict[str, Any]:
        return {
            "prompt": "p",
            "max_tokens": 1 if index == 0 else 9,
            "ignore_eos": True,
            "stream": True,
        }

    async with OpenAIClient(server.url) as client:
        load = Load(client, LoadPlan(concurrency=1, requests=9), "/v1/completions", body)
        running_load = asyncio.ensure_future(load.run())
        while not load.records:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        load.stop()
        await running_load
    assert len(load.records) == 1
    assert load.unfinished == 1


async def test_pieces_are_counted_where_the_server_counts_nothing(server: ScriptedServer) -> None:
    server.send_usage = False
    load = await run_load(server, LoadPlan(concurrency=1, requests=2))
    assert [record.completion_tokens for record in load.records] == [4, 4]
    summary = summarize(load.records, duration=1.0, output_tokens=4)
    assert any("no token counts" in line for line in remarks(summary, 2, 4))


# the command


def test_a_whole_run_gives_tables_and_json(server: ScriptedServer, tmp_path: Path) -> None:
    server.delay, server.api_key, server.extra_prompt_tokens = 0.01, "sesame", 12
    result = tmp_path / "result.json"
    done = bench(
        *("--url", server.url, "--api-key", "sesame", "--endpoint", "chat"),
        *("--concurrency", "2", "--requests", "6", "--warmup", "2"),
        *("--input-tokens", "40", "--output-tokens", "5", "--json", str(result)),
        *("--slo", "e2e>1ms", "--fail-if", "p99_ttft>600s", "--fail-if", "error_rate>0%"),
    )
    assert done.returncode == 0, done.stderr
    assert "TTFT" in done.stdout
    assert "…" not in done.stdout
    assert "240 (40 each)" in done.stdout
    assert "passed: not p99_ttft>600s" in done.stderr
    data = json.loads(result.read_text())
    assert data["model"] == "scripted"
    assert data["summary"]["completed"] == 6
    assert data["summary"]["completion_tokens"] == 30
    assert data["summary"]["goodput"] == pytest.approx(data["summary"]["request_throughput"])
    assert data["summary"]["itl"]["count"] == 24
    assert data["summary"]["itl"]["min"] > 0
    assert data["machine"]["cpus"] >= 1
    assert set(data["versions"]) == {"tgi", "python"}
    assert data["plan"]["load"]["concurrency"] == 2
    assert [request["index"] for request in data["requests"]] == list(range(6))
    assert "sesame" not in result.read_text()
    assert "--api-key ***" in data["command"]
    streamed = [body for body in server.requests if body["stream"]]
    assert len(streamed) == 8
    assert len({body["messages"][0]["content"] for body in streamed}) == 8
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in streamed)


def test_a_condition_that_holds_is_exit_code_1(server: ScriptedServer) -> None:
    server.first_delay = 0.05
    done = bench(
        *("--url", server.url, "--requests", "2", "--input-tokens", "5", "--output-tokens", "2"),
        *("--fail-if", "min_ttft>50ms", "--fail-if", "failed>0", "--json", "-", "--warmup", "0"),
    )
    assert done.returncode == 1
    assert "error: --fail-if min_ttft>50ms (min_ttft is " in done.stderr
    assert "passed: not failed>0 (failed is 0)" in done.stderr
    assert json.loads(done.stdout)["summary"]["completed"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "neither --url nor --model-id"),
        (["--url", "http://127.0.0.1:9", "--fail-if", "p99_ttft>5"], "has no unit"),
        (["--url", "http://127.0.0.1:9", "--slo", "p99_ttft>5ms"], "which is not measured"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "--rate is 0"),
        (["--url", "http://127.0.0.1:9", "--endpoint", "embed"], "completions or chat"),
        (["--url", "http://127.0.0.1:9", "--json", "/no/folder/x"], "folder does not exist"),
        (["--url", "http://127.0.0.1:9", "--concurrency", "none"], "--concurrency"),
    ],
)
def test_wrong_usage_is_found_before_any_load(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load_command("bench").main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert sentence in " ".join(said.err.split())
    assert said.out == ""


def test_a_server_that_cannot_be_measured_is_an_expected_failure(server: ScriptedServer) -> None:
    gone = bench("--url", "http://127.0.0.1:9")
    assert gone.returncode == 1
    assert "cannot reach http://127.0.0.1:9" in gone.stderr
    server.fail_every = 1
    failing = bench("--url", server.url, "--input-tokens", "3", "--requests", "2")
    assert failing.returncode == 1
    assert "every warm-up request failed: the server answered 503: busy" in failing.stderr
    unwarmed = bench(
        *("--url", server.url, "--input-tokens", "3", "--requests", "2", "--warmup", "0")
    )
    assert unwarmed.returncode == 1
    assert "none of 2 requests succeeded: the server answered 503: busy" in unwarmed.stderr


def test_ctrl_c_prints_what_there_is(server: ScriptedServer, tmp_path: Path) -> None:
    server.delay = 0.05
    argv = [
        *(sys.executable, "-m", "tgi_cli", "bench", "--url", server.url, "--requests", "100000"),
        *("--input-tokens", "4", "--output-tokens", "3", "--json", str(tmp_path / "part.json")),
    ]
    with Terminal(argv, environment()) as terminal:
        terminal.expect("in flight")  # the live view
        terminal.expect("p50")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ends() == 130
    assert "cut off by Ctrl-C" in terminal.shown
    data = json.loads((tmp_path / "part.json").read_text())
    assert data["summary"]["completed"] > 0
    assert data["summary"]["unfinished"] > 0


def test_keys_are_masked_in_the_recorded_command() -> None:
    assert shown_command(["/usr/bin/tgi", "bench", "--api-key", "k", "--api-key=k"]) == (
        "tgi bench --api-key *** --api-key=***"
    )
