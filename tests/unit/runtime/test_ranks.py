"""The other ranks as rank 0 sees them, without processes."""

from __future__ import annotations

import socket

import pytest

from tgi_cli.engine.control import ControlChannel, Ending
from tgi_cli.engine.nodes import Node
from tgi_cli.engine.ranks import Peer, Ranks
from tgi_cli.errors import EngineError


@pytest.mark.parametrize(
    ("ending", "said", "explained"),
    [
        (Ending.of(-9), "was killed by SIGKILL", True),
        (Ending.of(-15), "was killed by SIGTERM", False),
        (Ending.of(3), "ended with exit code 3", False),
        (Ending("left after a SIGKILL elsewhere"), "left after a SIGKILL elsewhere", False),
    ],
)
def test_the_end_of_a_rank_on_another_node(ending: Ending, said: str, explained: bool) -> None:
    """Its node says how it ended; a kill by the kernel is explained."""
    (control, theirs), (steps, other) = socket.socketpair(), socket.socketpair()
    node = Node(1, "10.0.0.2", ControlChannel(socket.socket()))
    peer = Peer(1, ControlChannel(control), ControlChannel(steps), node=node)
    ranks = Ranks([peer], step_timeout=60)
    try:
        node.ended(1, ending)
        theirs.close()
        with pytest.raises(EngineError) as caught:
            ranks.planned()
        assert caught.value.message == f"rank 1 on node 1 (10.0.0.2) {said}"
        assert ("dmesg" in (caught.value.hint or "")) == explained
    finally:
        ranks.close()
        other.close()
        node.channel.close()


def test_the_first_word_on_a_lost_node_counts() -> None:
    """A node that says why it leaves also hangs up; that must not hide what it said."""
    node = Node(1, "10.0.0.2", ControlChannel(socket.socket()))
    try:
        node.ended(None, Ending("was stopped with its node"))
        node.ended(None, Ending("is out of reach: its node is gone"))
        assert node.ending(1).how == "was stopped with its node"
    finally:
        node.channel.close()
