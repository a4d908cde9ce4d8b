"""BlockPool and BlockTable against a model that stores what each block holds."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tgi_cli.engine.block_pool import BlockPool
from tgi_cli.engine.step import NULL_BLOCK

NUM_BLOCKS = 9


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: dict[int, int] = {}
        self.contents: dict[bytes, int] = {}
        self.next_digest = 0

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        block_ids = self.pool.allocate(count)
        assert len(set(block_ids)) == count
        assert NULL_BLOCK not in block_ids
        for block_id in block_ids:
            assert block_id not in self.held
            self.held[block_id] = 1
        self.contents = {
            digest: block_id
            for digest, block_id in self.contents.items()
            if block_id not in block_ids
        }

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(block_id)
        self.held[block_id] -= 1
        if self.held[block_id] == 0:
            del self.held[block_id]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish_new(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        if block_id in self.contents.values():
            return
        digest = self.next_digest.to_bytes(4, "little")
        self.next_digest += 1
        self.pool.publish(block_id, digest)
        self.contents[digest] = block_id

    @precondition(lambda self: self.held and self.contents)
    @rule(data=st.data())
    def publish_equal(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        if block_id in self.contents.values():
            return
        self.pool.publish(block_id, data.draw(st.sampled_from(sorted(self.contents))))

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.contents)))
        block_id = self.pool.find(digest)
        assert block_id == self.contents[digest]
        assert self.pool.is_free(block_id) == (block_id not in self.held)
        self.pool.share(block_id)
        self.held[block_id] = self.held.get(block_id, 0) + 1

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.contents)))
        self.pool.retract(self.contents.pop(digest))
        assert self.pool.find(digest) is None

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.num_used == len(self.held)
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(self.held)
        assert self.pool.published() == self.contents


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
