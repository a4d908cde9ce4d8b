"""`tgi launch`: from flags and environment to a running server.

Makes its options from the flag table, settles the configuration and hands it to the supervisor; the
processes are the supervisor's business. Nothing here imports torch except `--dry-run`, which asks
the engine for its memory plan.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tgi_cli import log
from tgi_cli.cli.console import Printer, invocation
from tgi_cli.cli.launch_config import LaunchConfig, build, default_of, without_nodes
from tgi_cli.cli.launch_flags import LOGGING, SETTINGS
from tgi_cli.config import ServerConfig, Setting, environment, resolve
from tgi_cli.engine.messages import ModelFacts
from tgi_cli.errors import UsageError
from tgi_cli.serve.early_engine import EarlyEngine

_LOOPBACK = ("127.", "::1")


def command(ctx: typer.Context, **given: Any) -> None:
    """Serve a model over HTTP: the OpenAI API and TGI's own.

    Every flag can be set as `TGI_<NAME>` instead, and TGI's own flags as the bare name that TGI
    reads (`MODEL_ID`, `PORT`); the flag wins. With `--port 0` the server's URL is printed on
    stdout; everything else goes to stderr.
    """
    printer = invocation(ctx).printer
    own = {name: given.pop(name) for name in _OWN_OPTIONS}
    if own["json"] and not own["dry_run"]:
        raise UsageError("--json goes with --dry-run", hint="`--json-output` is for JSON logs")
    flags = {_spelling(name): value for name, value in given.items()}
    resolution = resolve(SETTINGS, flags, environment())
    config = build(SETTINGS, resolution, default_host=invocation(ctx).default_host)
    log.configure(config.server.log_level, json_logs=config.server.json_logs)
    talk = _Talk(printer, config.server)
    for notice in (*resolution.notices, *without_nodes(config, resolution)):
        talk.warn(notice)
    if resolution.values.get("env"):
        subprocess.run([sys.executable, "-m", "tgi_cli", "env"], stdout=sys.stderr, check=False)
    if own["show_config"]:
        printer.json(config.shown())
    elif own["dry_run"]:
        from tgi_cli.cli.memory_report import report_plan
        from tgi_cli.engine.memory_plan import plan_for

        plan = plan_for(config.engine)
        report_plan(printer, plan, as_json=own["json"])
        plan.check()
    else:
        if own["stop_with_stdin"]:
            threading.Thread(target=_stop_with_stdin, daemon=True).start()
        code = _serve(config, talk, invocation(ctx).early_engine)
        if code:
            raise typer.Exit(code)


def _serve(config: LaunchConfig, talk: _Talk, early_engine: EarlyEngine | None) -> int:
    if config.engine.parallel.node_rank > 0:
        if early_engine is not None:  # ranks are started by the node
            early_engine.give_up()
        from tgi_cli.engine.node import Node

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        return Node(config.engine).run()

    from tgi_cli.serve.supervisor import Supervisor

    # Until the supervisor listens to signals itself, an early SIGTERM must still clean up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    supervisor = Supervisor(
        config.engine,
        config.server,
        early_engine=early_engine,
        on_listening=talk.listening,
        on_ready=talk.ready,
    )
    return supervisor.run()


class _Talk:
    """What a starting server tells its user: sentences, or log records with `--json-output`."""

    def __init__(self, printer: Printer, server: ServerConfig) -> None:
        self._server = server
        self._printer = printer
        logger = logging.getLogger("tgi_cli.launch")
        self.warn: Callable[[str], None] = logger.warning if server.json_logs else printer.warn
        self._say: Callable[[str], None] = logger.info if server.json_logs else printer.say

    def listening(self, listener: socket.socket) -> None:
        """Say where the port is open, and to whom."""
        if listener.family == socket.AF_UNIX:
            self._say(f"listening on the Unix socket {listener.getsockname()}")
            self._print(f"unix:{listener.getsockname()}")
            return
        host, port = listener.getsockname()[:2]
        url = server_url(host, port, tls=self._server.ssl_certfile is not None)
        if host.startswith(_LOOPBACK):
            self._say(f"listening on {url}, for this machine only (--hostname 0.0.0.0 for others)")
        else:
            self._say(f"listening on {host} port {port}, for every machine that reaches it")
            if self._server.api_key is None and self._server.api_key_file is None:
                self.warn("no --api-key is set: whoever reaches the port may use the server")
        self._print(url)

    def _print(self, url: str) -> None:
        if self._server.port == 0:
            self._printer.data(url)
            sys.stdout.flush()

    def ready(self, facts: ModelFacts) -> None:
        """Say what is being served and within which limits."""
        quantization = ""
        if facts.quantization:
            quantization = f", {facts.quantization} with {facts.activation_dtype} activations"
        self._say(
            f"ready: {self._server.served_model_name or facts.model_id} "
            f"({facts.architecture}, {facts.dtype}{quantization}) on {facts.device} "
            f"with {facts.backend} kernels, deterministic: {str(facts.deterministic).lower()}"
        )
        self._say(
            f"context {facts.max_model_len:,} tokens, KV cache {facts.kv_cache_tokens:,} tokens "
            f"in {facts.kv_cache_dtype}, "
            f"up to {facts.max_num_seqs} sequences at once"
        )


def server_url(host: str, port: int, *, tls: bool = False) -> str:
    """The URL under which this machine reaches a server listening on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _stop_with_stdin() -> None:
    # Whoever started this server holds the other end: even if it is killed, stdin ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _parameter_name(spelling: str) -> str:
    return spelling.removeprefix("--").replace("-", "_")


def _spelling(parameter: str) -> str:
    return "--" + parameter.replace("_", "-")


def _help(setting: Setting) -> str:
    text = setting.help
    if setting.aliases:
        text += f" Also {', '.join(setting.aliases)}."
    default = default_of(setting.fields[0]) if setting.fields else None
    if default is not None and default is not False and default != ():
        text += f" Default {'on' if default is True else str(default).lower()}."
    return text


def _metavar(setting: Setting) -> str | None:
    if setting.kind == "switch":
        return None
    if setting.choices:
        return "|".join(setting.choices)
    return {"boolean": "true|false", "address": "IP", "list": "TEXT"}.get(
        setting.kind, setting.kind.upper()
    )


def _options(setting: Setting) -> list[inspect.Parameter]:
    """Typer parameters of one setting: the principal spelling shown, the aliases hidden."""
    kind: Any = str | None
    if setting.kind == "switch":
        kind = bool | None
    elif setting.kind == "list":
        kind = list[str] | None
    parameters = []
    for spelling in setting.spellings:
        declared = [spelling]
        if setting.negatable:
            declared = [f"{spelling}/--no-{spelling.removeprefix('--')}"]
        if setting.short and spelling == setting.flag:
            declared.append(setting.short)
        option = typer.Option(
            *declared,
            help=_help(setting),
            metavar=_metavar(setting),
            hidden=spelling != setting.flag,
            rich_help_panel=setting.panel,
            autocompletion=_completion(setting),
        )
        parameters.append(_keyword(_parameter_name(spelling), Annotated[kind, option], None))
    return parameters


def _completion(setting: Setting) -> Callable[[str], list[str]] | None:
    if not setting.choices:
        return None

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in setting.choices if choice.startswith(incomplete)]

    return complete


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _switch(flag: str, help: str, *, hidden: bool = False) -> inspect.Parameter:
    option = typer.Option(flag, help=help, hidden=hidden, rich_help_panel=LOGGING)
    return _keyword(_parameter_name(flag), Annotated[bool, option], False)


_OWN_PARAMETERS = (
    _switch("--dry-run", "Print the memory plan and exit: 0 if it fits, 1 if it cannot."),
    _switch("--json", "Print the memory plan as JSON; with --dry-run."),
    _switch("--show-config", "Print every setting as JSON and exit."),
    _switch("--stop-with-stdin", "Stop when stdin ends.", hidden=True),
)
_OWN_OPTIONS = tuple(parameter.name for parameter in _OWN_PARAMETERS)


def _signature() -> inspect.Signature:
    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    options = [parameter for setting in SETTINGS for parameter in _options(setting)]
    return inspect.Signature([context, *options, *_OWN_PARAMETERS])


# Typer reads a command's options from its signature, and this one's is the flag table.
command.__signature__ = _signature()  # type: ignore[attr-defined]
command.__annotations__ = {
    name: parameter.annotation for name, parameter in _signature().parameters.items()
}
