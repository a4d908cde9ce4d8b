"""Finds blocks that hold a sequence's beginning already, in all KV groups at once.

A block's digest chains over its parent's, so it stands for all tokens before it too; the root
holds the salts, so that tenants, adapters and `cache_salt`s never meet. The chain is the same for
every group, the index is per group: windows keep and lose other blocks than full attention.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Items

from tgi_cli.engine.messages import Request
from tgi_cli.engine.sequence import Sequence
from tgi_cli.engine.step import NULL_BLOCK

_DIGEST_SIZE = 16  # bytes: 2^64 blocks before a collision is likely


def root_digest(request: Request) -> bytes:
    """Parent of a request's first block."""
    salts = (request.tenant.encode(), request.cache_salt.encode(), request.adapter.encode())
    state = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for salt in salts:
        state.update(len(salt).to_bytes(8, "little") + salt)
    return state.digest()


def block_digest(parent: bytes, token_ids: Items[int]) -> bytes:
    """Digest of a full block that follows `parent`."""
    data = parent + array("I", token_ids).tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest()


class PrefixCache:
    """The index over the groups' pools, which it reaches through the sequences' tables."""

    __slots__ = ("_block_size",)

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def match(self, sequence: Sequence) -> list[list[int]]:
        """Find the longest usable beginning: for each group the cached block ids, nulls included.

        A beginning of n blocks is usable if full groups have them all and every window group has
        those that the window before position `n * block_size` covers. At least one token is left
        to run, or there would be nothing to sample from.
        """
        tables, size = sequence.tables, self._block_size
        best = 0
        runs = [0] * len(tables)  # cached blocks in a row up to here, per group
        found: list[list[int]] = [[] for _ in tables]
        for index in range((len(sequence.token_ids) - 1) // size):
            digest = self._digest(sequence, index)
            usable = True
            end = (index + 1) * size
            for group, table in enumerate(tables):
                block_id = table.pool.find(digest)
                found[group].append(NULL_BLOCK if block_id is None else block_id)
                runs[group] = 0 if block_id is None else runs[group] + 1
                usable &= runs[group] >= index + 1 - table.layout.first_block(end, size)
                if block_id is None and table.layout.window is None:
                    return self._trim(sequence, found, best)
            if usable:
                best = index + 1
        return self._trim(sequence, found, best)

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the full blocks among the first `num_tokens` positions, all of known tokens.

        Also while the step that writes them is in flight: steps run in order, and the scheduler
        publishes after it has built a step, so only later ones can share.
        """
        end = num_tokens // self._block_size
        for index in range(sequence.num_published, end):
            digest = self._digest(sequence, index)
            for table in sequence.tables:
                block_id = table.block_ids[index]
                if block_id != NULL_BLOCK:
                    table.pool.publish(block_id, digest)
        sequence.num_published = max(sequence.num_published, end)

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        digests, size = sequence.block_hashes, self._block_size
        if index == len(digests):
            parent = digests[-1] if digests else root_digest(sequence.request)
            digests.append(
                block_digest(parent, sequence.token_ids[index * size : (index + 1) * size])
            )
        return digests[index]

    def _trim(self, sequence: Sequence, found: list[list[int]], count: int) -> list[list[int]]:
        hits = []
        for table, block_ids in zip(sequence.tables, found, strict=True):
            first = table.layout.first_block(count * self._block_size, self._block_size)
            hits.append([NULL_BLOCK] * first + block_ids[first:count])
        return hits
