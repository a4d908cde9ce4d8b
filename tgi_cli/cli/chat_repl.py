"""The interactive chat: prompt, slash commands, streamed answers.

Ctrl-C stops an answer and keeps what there is of it; Ctrl-D or /exit leaves. The prompt and all
talk go to stderr, answers to stdout. Knows of the server only its client.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from rich.console import Console
from rich.table import Table

from tgi_cli.cli.chat_answer import ask
from tgi_cli.cli.chat_session import ChatSession
from tgi_cli.cli.console import Printer
from tgi_cli.cli.markdown_stream import MarkdownStream
from tgi_cli.cli.openai_client import OpenAIClient
from tgi_cli.config import state_dir
from tgi_cli.errors import TgiError, UsageError

_WELCOME = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, /help lists commands"


class ChatRepl:
    """One interactive conversation; `run` returns when the user leaves."""

    def __init__(
        self, client: OpenAIClient, session: ChatSession, printer: Printer, *, markdown: bool
    ) -> None:
        self._client = client
        self._session = session
        self._printer = printer
        self._out = Console(highlight=False)
        self._markdown = markdown and self._out.is_terminal
        self._leaving = False
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("list these commands", self._help),
            "/reset": ("forget the conversation, keep system prompt and parameters", self._reset),
            "/system": ("[TEXT] set the system prompt, or show it", self._system),
            "/save": ("FILE write the conversation to a file", self._save),
            "/load": ("FILE go on from a saved conversation", self._load),
            "/params": ("[NAME=VALUE ...] set sampling parameters, or show them", self._params),
            "/stats": ("show tokens and times of the answers so far", self._stats),
            "/exit": ("leave; Ctrl-D does too", self._exit),
        }

    async def run(self) -> None:
        """Read and answer until the user leaves."""
        prompt = self._prompt_session()
        self._printer.say(f"{self._session.model} at {self._client.url}", style="bold")
        self._printer.say(_WELCOME, style="dim")
        while not self._leaving:
            try:
                line = (await prompt.prompt_async(HTML("<b><ansigreen>> </ansigreen></b>"))).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._printer.say("Ctrl-D or /exit leaves", style="dim")
                continue
            try:
                if line.startswith("/"):
                    self._run_command(line)
                elif line:
                    await self._answer(line)
            except TgiError as error:
                self._printer.error(error.message, error.hint)

    async def _answer(self, question: str) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            if self._markdown:
                show = stack.enter_context(MarkdownStream(self._out)).feed
            else:
                show = self._print_raw
                stack.callback(self._out.print)
            task = asyncio.ensure_future(ask(self._client, self._session, question, show))
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            stack.callback(loop.remove_signal_handler, signal.SIGINT)
            await asyncio.wait([task])
        if task.cancelled():
            self._printer.say("stopped", style="yellow")
        else:
            self._printer.say(task.result().line(), style="dim")

    def _print_raw(self, text: str) -> None:
        self._out.print(text, end="", markup=False, soft_wrap=True)

    def _prompt_session(self) -> PromptSession[str]:
        keys = KeyBindings()

        # Enter pressed ahead, while an answer still streams, arrives as Ctrl-J.
        @keys.add("enter")
        @keys.add("c-j")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("escape", "c-j")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        return PromptSession(
            history=self._history(),
            key_bindings=keys,
            multiline=True,
            completer=WordCompleter(list(self._commands), sentence=True),
            complete_while_typing=False,
            output=create_output(stdout=sys.stderr),
        )

    def _history(self) -> History:
        path = state_dir() / "chat_history"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
        except OSError as error:
            self._printer.warn(f"this chat's history is not kept: {error}")
            return InMemoryHistory()
        return FileHistory(str(path))

    def _run_command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UsageError(f"there is no command {name}", hint="/help lists the commands")
        self._commands[name][1](argument.strip())

    def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (text, _) in self._commands.items():
            table.add_row(f"[bold]{name}[/]", text.replace("[", r"\["))
        self._printer.console.print(table)
        self._printer.say(_WELCOME, style="dim")

    def _reset(self, argument: str) -> None:
        self._session.reset()
        self._printer.say("the conversation is empty", style="dim")

    def _system(self, argument: str) -> None:
        if argument:
            self._session.system = argument
        self._printer.say(f"system prompt: {self._session.system or 'none'}", style="dim")

    def _save(self, argument: str) -> None:
        self._session.save(_file(argument, "/save"))
        self._printer.say(f"saved {len(self._session.messages)} messages", style="dim")

    def _load(self, argument: str) -> None:
        self._session.load(_file(argument, "/load"))
        self._printer.say(f"loaded {len(self._session.messages)} messages", style="dim")

    def _params(self, argument: str) -> None:
        for assignment in argument.split():
            self._session.set_param(assignment)
        shown = ", ".join(f"{name}={value}" for name, value in self._session.params.items())
        self._printer.say(shown or "all parameters are the server's defaults", style="dim")

    def _stats(self, argument: str) -> None:
        answers = self._session.answers
        for number, stats in enumerate(answers, 1):
            self._printer.say(f"{number}: {stats.line()}", style="dim")
        tokens = sum(stats.completion_tokens or 0 for stats in answers)
        seconds = sum(stats.seconds for stats in answers)
        self._printer.say(
            f"{len(answers)} answers, {tokens} tokens, {seconds:.2f} s; "
            f"{len(self._session.messages)} messages in the conversation"
        )

    def _exit(self, argument: str) -> None:
        self._leaving = True


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError(f"{command} needs a file name", hint=f"{command} chat.json")
    return Path(argument).expanduser()
