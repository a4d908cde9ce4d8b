"""`tgi bench`: load on any OpenAI-compatible server, figures on stdout, an exit code for CI.

Reads the flags and puts the parts together: prompts, load, report, conditions. Streaming only: that
is how people wait for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import resource
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
import uvloop

from tgi_cli.cli.bench_result import BenchResult, machine, shown_command
from tgi_cli.cli.conditions import (
    REQUEST_METRICS,
    RUN_METRICS,
    Condition,
    parse_condition,
    show_value,
)
from tgi_cli.cli.console import Printer, invocation
from tgi_cli.cli.load import Load, LoadPlan
from tgi_cli.cli.local_server import LocalServer
from tgi_cli.cli.openai_client import OpenAIClient, base_url
from tgi_cli.cli.prompts import Prompts, calibrate
from tgi_cli.config import default_api_key
from tgi_cli.errors import RemoteError, TgiError, UsageError

_WARMUP_INDEX = 1_000_000_000  # warm-up prompts are none of the measured ones
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_LOAD, _REPORT = "Load", "Report"


class BenchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, as it stands in the JSON result."""

    endpoint: Literal["completions", "chat"]
    input_tokens: int
    output_tokens: int
    ignore_eos: bool
    temperature: float
    warmup: int
    load: LoadPlan
    slos: tuple[Condition, ...] = ()

    def body(self, model: str, prompt: str, index: int) -> dict[str, Any]:
        """The request that sends `prompt`."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "seed": self.load.seed + index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return body


def command(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="A running OpenAI-compatible server to measure.")
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option("--model-id", help="Model to serve for this run, or to ask for at --url."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The server's key; TGI_API_KEY does the same.")
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="completions or chat.", metavar="completions|chat")
    ] = "completions",
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Clients that each send one request after the other (8); with --rate the most "
            "requests in flight.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second that arrive at random, however long answers take.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="End after this many requests (64).", rich_help_panel=_LOAD),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Send nothing after this many seconds.", rich_help_panel=_LOAD),
    ] = None,
    input_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each prompt.", rich_help_panel=_LOAD)
    ] = 128,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each answer.", rich_help_panel=_LOAD)
    ] = 64,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for full-length answers, a field that some servers do not know.",
            rich_help_panel=_LOAD,
        ),
    ] = True,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 is greedy.", rich_help_panel=_LOAD)
    ] = 0.0,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before measuring.", rich_help_panel=_LOAD)
    ] = 4,
    timeout: Annotated[
        float, typer.Option(help="Seconds a request may take.", rich_help_panel=_LOAD)
    ] = 600.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Fixes prompts and arrivals.", rich_help_panel=_LOAD)
    ] = 0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help='What a good request must meet, like "ttft<500ms" (ttft, tpot, e2e); repeatable.',
            rich_help_panel=_REPORT,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help='Exit with 1 if this holds, like "p99_ttft>500ms", "error_rate>1%" or '
            '"output_throughput<100tok/s"; repeatable.',
            rich_help_panel=_REPORT,
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write everything measured as JSON; - is stdout.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
) -> None:
    """Measure a running server, or a model served for the occasion.

    Closed loop by default: --concurrency clients, --requests in all. With --rate requests arrive
    at random times instead (open loop), and latencies count from the planned arrival.
    """
    printer = invocation(ctx).printer
    if endpoint not in _PATHS:
        raise UsageError(f"--endpoint is {endpoint!r} but must be completions or chat")
    for flag, value in (("--rate", rate), ("--duration", duration), ("--timeout", timeout)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{flag} is {value:g} but must be more than 0")
    if model_id is None and url is None:
        raise UsageError(
            "nothing to measure: neither --url nor --model-id is given",
            hint="`tgi bench --model-id demo` serves a small model for the run",
        )
    conditions = [parse_condition("--fail-if", text, RUN_METRICS) for text in fail_if or ()]
    slos = [parse_condition("--slo", text, REQUEST_METRICS) for text in slo or ()]
    if json_file not in (None, "-") and not Path(json_file or "").parent.is_dir():
        raise UsageError(f"--json names {json_file}, whose folder does not exist")
    if requests is None and duration is None:
        requests = 64
    if rate is None:
        concurrency = concurrency or 8
    plan = BenchPlan(
        endpoint="chat" if endpoint == "chat" else "completions",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        warmup=warmup,
        load=LoadPlan(
            concurrency=concurrency,
            rate=rate,
            requests=requests,
            duration=duration,
            timeout=timeout,
            seed=seed,
        ),
        slos=tuple(slos),
    )
    key = api_key or default_api_key()
    if url is not None:
        url = base_url(url)
    with contextlib.ExitStack() as stack:
        if url is None:
            assert model_id is not None
            server = stack.enter_context(LocalServer(model_id, printer))
            url, key, model_id = server.url, server.api_key, None
        client = OpenAIClient(url, api_key=key)
        result, interrupted = uvloop.run(_measure(client, model_id, plan, printer))
    _publish(result, printer, json_file)
    if interrupted:
        raise typer.Exit(130)
    _judge(result, conditions, printer)


async def _measure(
    client: OpenAIClient, model: str | None, plan: BenchPlan, printer: Printer
) -> tuple[BenchResult, bool]:
    """Warm up, run the load, and say whether Ctrl-C ended it."""
    _allow_many_sockets()
    async with client:
        model = model or await client.first_model()
        server = await _server_facts(client)
        printer.say(f"measuring {model} at {client.url}")
        prompts = await _calibrated_prompts(client, model, plan)
        path = _PATHS[plan.endpoint]

        def load(load_plan: LoadPlan, first: int) -> Load:
            return Load(
                client,
                load_plan,
                path,
                lambda index: plan.body(model, prompts.prompt(first + index), first + index),
            )

        if plan.warmup:
            await _warm_up(load(_warmup_plan(plan), _WARMUP_INDEX))
        started = datetime.datetime.now(datetime.UTC)
        main = load(plan.load, 0)
        interrupted = await _watch(main, plan, printer)
    result = BenchResult.of(
        main,
        started=started.isoformat(timespec="seconds"),
        command=shown_command(sys.argv),
        model=model,
        url=client.url,
        server=server,
        machine=machine(),
        plan=msgspec.to_builtins(plan),
        output_tokens=plan.output_tokens,
        slos=plan.slos,
    )
    return result, interrupted


async def _watch(load: Load, plan: BenchPlan, printer: Printer) -> bool:
    """Run the load under the live view; True when Ctrl-C stopped it."""
    interrupted = False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        load.stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        if not printer.animated:
            await load.run()
        else:
            from tgi_cli.cli.bench_view import live_view

            async with live_view(printer.console, load, plan.load):
                await load.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return interrupted


def _warmup_plan(plan: BenchPlan) -> LoadPlan:
    return LoadPlan(
        concurrency=min(plan.warmup, plan.load.concurrency or plan.warmup),
        requests=plan.warmup,
        timeout=plan.load.timeout,
        seed=plan.load.seed,
    )


async def _warm_up(load: Load) -> None:
    await load.run()
    failed = [record for record in load.records if record.error]
    if len(failed) == len(load.records):
        raise RemoteError(
            f"every warm-up request failed: {failed[0].message}", kind=failed[0].error or ""
        )


async def _calibrated_prompts(client: OpenAIClient, model: str, plan: BenchPlan) -> Prompts:
    async def count(text: str) -> int:
        body = plan.body(model, text, 0) | {"max_tokens": 1, "stream": False}
        del body["stream_options"]
        answer = await client.json("POST", _PATHS[plan.endpoint], body)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        return int((usage or {}).get("prompt_tokens") or 0)

    try:
        return await calibrate(count, plan.input_tokens, plan.load.seed)
    except RemoteError as error:
        if error.kind == "http 404" and plan.endpoint == "completions":
            error.hint = "a server without /v1/completions is measured with --endpoint chat"
        elif error.kind == "http 400" and plan.ignore_eos and "ignore_eos" in error.message:
            error.hint = "leave the field out with --no-ignore-eos"
        raise


async def _server_facts(client: OpenAIClient) -> dict[str, Any]:
    """What the server says of itself, where it has TGI's /info or vLLM's /version."""
    for path in ("/info", "/version"):
        with contextlib.suppress(RemoteError):
            facts = await client.json("GET", path)
            if isinstance(facts, dict):
                return facts
    return {}


def _allow_many_sockets() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _publish(result: BenchResult, printer: Printer, json_file: str | None) -> None:
    data = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if json_file == "-":
        printer.data(data)
    else:
        from rich.console import Console

        from tgi_cli.cli.report import tables

        Console(file=sys.stdout, highlight=False).print(tables(result.summary))
        for line in result.remarks:
            printer.say(f"note: {line}", style="yellow")
    if json_file not in (None, "-"):
        try:
            Path(json_file or "").write_text(data + "\n", encoding="utf-8")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TgiError(f"cannot write {json_file}: {reason}") from error


def _judge(result: BenchResult, conditions: list[Condition], printer: Printer) -> None:
    """Raise `TgiError` when nothing succeeded or a `--fail-if` holds or was not measured."""
    summary = result.summary
    if not summary.completed:
        first = next((record.message for record in result.requests if record.message), None)
        raise TgiError(
            f"none of {summary.failed} requests succeeded: {first}"
            if first
            else "no request was sent",
            hint="raise --duration or --rate" if first is None else None,
        )
    failed = []
    for condition in conditions:
        value = summary.metric(condition.metric)
        shown = f"{condition.metric} is {show_value(condition.metric, value)}"
        if condition.holds(value) is False:
            printer.say(f"passed: not {condition.text} ({shown})", style="green")
        else:
            failed.append(f"{condition.text} ({shown})")
    if failed:
        raise TgiError(f"--fail-if {' and '.join(failed)}")
