"""The demo once tgi is installed: fetch the model, serve it, ask one question, keep serving.

Talks to the server over HTTP with the standard library, as any client would.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

TGI = str(Path(sys.executable).with_name("tgi"))
QUESTION = "What is the capital of France?"
TRY_NEXT = """
The server keeps running at {url} until Ctrl-C. Try, from another terminal:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "tgi", "messages": [{{"role": "user", "content": "Tell me a story."}}]}}'

  .venv/bin/tgi chat --url {url}

  # with the openai package
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  print(client.chat.completions.create(model="tgi",
      messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)
"""


def say(text: str) -> None:
    """Talk goes to stderr, so that stdout holds the answer alone."""
    print(text, file=sys.stderr, flush=True)


def fail(sentence: str, hint: str) -> None:
    """End the program with one sentence and a way out."""
    say(f"error: {sentence}\n\nhint: {hint}")
    raise SystemExit(1)


def wait_until_ready(url: str, server: subprocess.Popen[str]) -> None:
    """Follow `/health` until it says 200; end with the server if that ends."""
    shown = ""
    while True:
        code = server.poll()
        if code is not None:
            raise SystemExit(code or 1)  # the server has said why on stderr
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                if shown and sys.stderr.isatty():
                    say("")
                return
        except urllib.error.HTTPError as error:
            body = json.loads(error.read() or b"{}")
            state = body.get("error") or ""
            state = state if isinstance(state, str) else state.get("message", "")
            # On a terminal one line that counts up, elsewhere one line a phase.
            terminal = sys.stderr.isatty()
            state = state if terminal else re.sub(r" \d+ %$", "", state)
            if state and state != shown:
                print(
                    f"\r\033[K  {state}" if terminal else f"  {state}",
                    end="" if terminal else "\n",
                    file=sys.stderr,
                    flush=True,
                )
                shown = state
        except OSError:
            pass  # not listening yet
        time.sleep(0.1)


def ask(url: str, question: str, max_tokens: int) -> Iterator[str]:
    """Stream the answer to one chat question, piece by piece."""
    body = {
        "model": "tgi",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                fail(f"the server answered: {event['error']['message']}", "its log is above")
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def launch(port: int) -> tuple[subprocess.Popen[str], str]:
    """Start `tgi launch` and return it with its URL."""
    server = subprocess.Popen(
        # Exact activations: so small a model in 4 bits is undecided in its first words, and the
        # default, int8, is made for speed (docs/quantization.md).
        [
            TGI,
            "launch",
            "--model-id",
            "demo",
            "--port",
            str(port),
            "--activation-dtype",
            "bfloat16",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    if port:
        return server, f"http://127.0.0.1:{port}"
    assert server.stdout is not None
    url = server.stdout.readline().strip()  # `--port 0` prints where it listens
    if not url:
        raise SystemExit(server.wait() or 1)
    return server, url


def stop(server: subprocess.Popen[str]) -> None:
    """Let the server drain, then make sure it is gone."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()


def main() -> int:
    """Run the demo; the exit code is 0 when the question was answered."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", metavar="QUESTION", help="answer on stdout, then exit")
    parser.add_argument("--port", type=int, help="default 3000; a free port with --once")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    port = options.port if options.port is not None else (0 if options.once else 3000)

    say("fetching the demo model (SmolLM2-135M-Instruct, 98 MB), unless it is there")
    if subprocess.run([TGI, "download", "demo"], stdout=subprocess.DEVNULL).returncode:
        return 1  # `tgi download` has said why
    say("starting the server")
    server, url = launch(port)
    try:
        wait_until_ready(url, server)
        question = options.once or QUESTION
        say(f"\n> {question}")
        for piece in ask(url, question, options.max_tokens):
            print(piece, end="", flush=True)
        print(flush=True)
        if not options.once:
            say(TRY_NEXT.format(url=url))
            return server.wait()
    except urllib.error.URLError as error:
        fail(f"the server at {url} did not answer: {error}", "its log is above")
    except KeyboardInterrupt:
        say("")
    finally:
        stop(server)
    return 0


if __name__ == "__main__":
    sys.exit(main())
