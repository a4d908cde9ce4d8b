"""A model over two hosts, started as a user starts it: the tokens of one, and every way to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hosts import ADDRESSES, Host, Launched, reason_against, two_hosts
from tests.golden.engine import make_core, request_of, run
from tests.http.live import ENGINE, gone, wait_until
from tgi_cli.kernels.cpu import library
from tgi_cli.tokenizer import load_tokenizer

WORKER = "tgi_cli.engine.worker"
NODES = ("--nnodes", "2", "--num-shard", "2", "--master-addr", ADDRESSES[0])
LIMITS = ("--kv-cache-tokens", "32768", "--max-model-len", "16384", "--num-threads", "1")
PROMPTS = ["one two three", "a", "the quick brown fox jumps over the lazy dog " * 5]
COUNT = 16

_reason = reason_against()
pytestmark = [
    pytest.mark.skipif(_reason is not None, reason=str(_reason)),
    pytest.mark.skipif(library.load() is None, reason="the native kernels are not built"),
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", max_position_embeddings=16384)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as found:
        yield found


def front(host: Host, model: Path, tmp_path: Path, *flags: str) -> Launched:
    model_flags = ("--model-id", str(model), "--dtype", "float32")
    uds = ("--uds", str(tmp_path / "http.sock"))
    return host.launch(*model_flags, *LIMITS, *NODES, "--node-rank", "0", *uds, *flags)


def other(host: Host, model: Path, *flags: str) -> Launched:
    return host.launch("--model-id", str(model), *NODES, "--node-rank", "1", *flags)


def answers(server: Launched) -> list[list[int]]:
    """Greedy tokens of all prompts."""
    found = []
    for prompt in PROMPTS:
        parameters = {"max_new_tokens": COUNT, "details": True}
        status, reply = server.ask("/generate", {"inputs": prompt, "parameters": parameters})
        assert status == 200, reply
        found.append([token["id"] for token in reply["details"]["tokens"]])
    return found


class Stream:
    """A long request in the background."""

    def __init__(self, server: Launched) -> None:
        self.reply: tuple[int, Any] | None = None
        body = {"prompt": [5, 6, 7], "max_tokens": 15000, "ignore_eos": True}
        self._thread = threading.Thread(target=self._run, args=(server, body))
        self._thread.start()

    def _run(self, server: Launched, body: Any) -> None:
        self.reply = server.ask("/v1/completions", body)

    def ended(self) -> tuple[int, Any]:
        self._thread.join(60)
        assert self.reply is not None
        return self.reply


def running(server: Launched) -> bool:
    lines = server.ask("/metrics")[1].splitlines()
    found = [line.split()[1] for line in lines if line.startswith("tgi_running_sequences")]
    return float(found[0]) > 0


def test_two_hosts_answer_as_one(hosts: tuple[Host, Host], model: Path, tmp_path: Path) -> None:
    """Tokens, then a killed rank, from which both recover, then the end of the service."""
    tokenizer, expected = load_tokenizer(str(model)), []
    for num_shard in (1, 2):
        core = make_core(model, num_shard=num_shard, block_size=16)
        asked = [
            request_of(f"r{i}", tokenizer.encode(prompt, True), max_tokens=COUNT)
            for i, prompt in enumerate(PROMPTS)
        ]
        try:
            found = run(core, asked)
        finally:
            core.close()
        expected.append([found[request.id].token_ids for request in asked])
    assert expected[0] == expected[1]
    with ExitStack() as stack:
        # The other one comes first: it waits for node 0.
        second = stack.enter_context(other(hosts[1], model))
        first = stack.enter_context(front(hosts[0], model, tmp_path))
        first.wait_ready()
        assert answers(first) == expected[0]
        ranks = first.ask("/info")[1]["ranks"]
        worker = second.child(WORKER)
        assert [rank["pid"] for rank in ranks] == [first.child(ENGINE).pid, worker.pid]
        assert [rank["host"] for rank in ranks] == list(ADDRESSES)

        stream = Stream(first)
        wait_until(lambda: running(first))
        worker.kill()
        status, reply = stream.ended()
        assert status == 503
        assert f"rank 1 on node 1 ({ADDRESSES[1]}) was killed by SIGKILL" in str(reply)
        wait_until(lambda: gone([worker]))
        first.wait_ready()  # the engine was started anew, and node 1 came back to it
        assert answers(first) == expected[0]

        worker = second.child(WORKER)
        assert first.stop() == 0
        assert second.ended() == 0
        assert "node 0 has stopped" in second.stderr
        assert gone([worker])


@pytest.mark.parametrize("fault", ["stopped rank", "killed node", "stopped node", "cable"])
def test_a_lost_node_is_noticed(
    fault: str, hosts: tuple[Host, Host], model: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(front(hosts[0], model, tmp_path, "--max-engine-restarts", "0"))
        second = stack.enter_context(other(hosts[1], model, "--dist-timeout", "60"))
        first.wait_ready()
        stream = Stream(first)
        wait_until(lambda: running(first))
        family = second.family()
        if fault == "stopped rank":
            second.child(WORKER).send_signal(signal.SIGSTOP)
            said = "gave no sign of life for 1.5 seconds"
        elif fault == "killed node":
            second.process.kill()
            said = "is out of reach: its node is gone"
        elif fault == "stopped node":
            second.process.send_signal(signal.SIGTERM)
            said = "was stopped with its node"
        else:
            hosts[1].unplug()
            said = "gave no sign of life for 1.5 seconds"
        status, reply = stream.ended()
        assert status == 503
        assert f"rank 1 on node 1 ({ADDRESSES[1]}) {said}" in str(reply)
        assert first.ended() == 1
        assert f"rank 1 on node 1 ({ADDRESSES[1]}) {said}" in first.stderr
        if (
            fault == "cable" or fault == "stopped rank"
        ):  # its ranks end by themselves, and it gives node 0 up later
            wait_until(lambda: not second.running(WORKER))
        else:
            second.process.wait(60)
            wait_until(lambda: gone(family))


def test_a_node_that_cannot_take_part_is_told_why(
    hosts: tuple[Host, Host], model: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    stranger = tiny_checkpoint("llama")
    with front(hosts[0], model, tmp_path, "--dist-timeout", "45") as first:
        with other(hosts[1], stranger) as wrong:
            assert wrong.ended() == 2
            said = f"node 1 ({ADDRESSES[1]}) has another model than node 0: {stranger}"
            assert said in wrong.stderr
        with hosts[1].launch(
            "--model-id", str(model), "--nnodes", "2", "--num-shard", "4", "--node-rank", "1",
            "--master-addr", ADDRESSES[0],
        ) as odd:  # fmt: skip
            assert odd.ended() == 2
            assert "was started with --num-shard 4 and node 0 with 2" in odd.stderr
        assert first.ended() == 1
        assert "node 1 has not joined within 45 seconds (--dist-timeout)" in first.stderr
        assert "--num-shard 4" in first.stderr


def test_a_node_without_node_0_gives_up(hosts: tuple[Host, Host], model: Path) -> None:
    with other(hosts[1], model, "--dist-timeout", "2", "--master-port", "29511") as lonely:
        assert lonely.ended() == 1
        assert f"node 0 does not answer at {ADDRESSES[0]}:29511 after 2 seconds" in lonely.stderr
        assert "Traceback" not in lonely.stderr
