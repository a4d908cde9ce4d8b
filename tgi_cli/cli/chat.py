"""`tgi chat`: talk to a model in the terminal, or ask it one thing from a script.

Finds out how it is used (terminal, pipe, prompt given) and with which server; the conversation
itself is `chat_repl`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Annotated

import typer

from tgi_cli.cli.chat_answer import ask
from tgi_cli.cli.chat_session import PARAMETERS, ChatSession
from tgi_cli.cli.console import Printer, invocation
from tgi_cli.cli.local_server import LocalServer
from tgi_cli.cli.openai_client import OpenAIClient, base_url
from tgi_cli.config import default_api_key
from tgi_cli.errors import UsageError


def command(
    ctx: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this, print the answer and end.")
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option("--model-id", help="Model to serve for this chat, or to ask for at --url."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running OpenAI-compatible server.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[str | None, typer.Option(metavar="NUMBER", help="0 is greedy.")] = None,
    top_p: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Share of probability to sample from.")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="Longest answer, in tokens.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(metavar="INTEGER", help="The same seed gives the same answer.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The server's key; TGI_API_KEY does the same.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they come, without Markdown.")
    ] = False,
) -> None:
    """Talk to a model in the terminal.

    With a prompt or with piped input it prints one answer on stdout and ends; the prompt comes
    first, then what was piped.
    """
    printer = invocation(ctx).printer
    if model_id is None and url is None:
        raise UsageError(
            "no model: neither --model-id nor --url is given",
            hint="`tgi chat --model-id demo` starts a small model",
        )
    if url is not None:
        url = base_url(url)
    session = ChatSession(model_id or "", system)
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    for name, text in given.items():
        if text is not None:
            flag = "--" + name.replace("_", "-")
            session.params[name] = PARAMETERS[name].read(flag, text.strip())
    question = _question(prompt)
    key = api_key or default_api_key()
    with contextlib.ExitStack() as stack:
        if url is None:
            assert model_id is not None
            server = stack.enter_context(LocalServer(model_id, printer))
            url, key, session.model = server.url, server.api_key, ""
        asyncio.run(_chat(OpenAIClient(url, api_key=key), session, printer, question, not plain))


async def _chat(
    client: OpenAIClient,
    session: ChatSession,
    printer: Printer,
    question: str | None,
    markdown: bool,
) -> None:
    async with client:
        if not session.model:
            session.model = await client.first_model()
        if question is None:
            from tgi_cli.cli.chat_repl import ChatRepl

            await ChatRepl(client, session, printer, markdown=markdown).run()
        else:
            await _answer_once(client, session, printer, question)


async def _answer_once(
    client: OpenAIClient, session: ChatSession, printer: Printer, question: str
) -> None:
    ended_line = True

    def show(text: str) -> None:
        nonlocal ended_line
        ended_line = text.endswith("\n")
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        stats = await ask(client, session, question, show)
    finally:
        if not ended_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
    printer.detail(stats.line())


def _question(prompt: str | None) -> str | None:
    """What to ask once, or None for an interactive chat."""
    piped = ""
    if not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode().strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"the piped input is not UTF-8 at byte {error.start}") from None
    parts = [part for part in (prompt, piped) if part]
    if parts:
        return "\n\n".join(parts)
    if sys.stdin.isatty() and prompt is None:
        return None
    raise UsageError("nothing to ask: the prompt and the piped input are empty")
