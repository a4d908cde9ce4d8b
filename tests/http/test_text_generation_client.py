"""TGI's own Python client, `text-generation` 0.7.0, in a virtual environment of its own.

It pins an old huggingface-hub, so it cannot live beside ours. Its streaming chat is left out: it
demands `tool_calls` in every chunk and cannot read `[DONE]`, so it never worked with TGI either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.http.live import LiveServer
from tests.http.own_venv import python_with, run_script

_SCRIPT = """
import asyncio, sys
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

url = sys.argv[1]
client = Client(url, timeout=60)
reply = client.generate("The server", max_new_tokens=6, decoder_input_details=True)
assert reply.details.generated_tokens <= 6, reply
assert reply.details.prefill[0].logprob is None
assert "".join(token.text for token in reply.details.prefill) == "The server"
text = ""
for event in client.generate_stream("The server", max_new_tokens=6):
    if not event.token.special:
        text += event.token.text
assert event.generated_text == reply.generated_text == text, (event, reply, text)
assert event.details.finish_reason == reply.details.finish_reason

reply = client.generate("The server", max_new_tokens=4, best_of=2, do_sample=True)
assert len(reply.details.best_of_sequences) == 1
try:
    client.generate("The server", max_new_tokens=10**6)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise AssertionError("was not refused")

chat = client.chat([{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0.0)
assert chat.choices[0].message.content is not None

async def main():
    reply = await AsyncClient(url, timeout=60).generate("The server", max_new_tokens=6)
    assert reply.generated_text == text
    parts = ""
    async for event in AsyncClient(url, timeout=60).generate_stream("The server", max_new_tokens=6):
        if not event.token.special:
            parts += event.token.text
    assert parts == text

asyncio.run(main())
print("done")
"""


@pytest.mark.contract
def test_text_generation_client(
    pytestconfig: pytest.Config, tiny_checkpoint: Callable[..., Path]
) -> None:
    python = python_with(pytestconfig, "text-generation==0.7.0")
    with LiveServer(tiny_checkpoint("llama"), "--dtype", "float32") as server:
        run_script(python, _SCRIPT, server.url)
