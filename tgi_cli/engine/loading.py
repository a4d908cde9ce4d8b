"""One rank's part of a model: opened and planned, then built. The same for rank 0 and the others.

Two steps, because all ranks agree on the size of the KV cache before any of them reads a weight.
Knows no other process: ranks meet in the collective that it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import msgspec

from tgi_cli import __version__
from tgi_cli.config import EngineConfig
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.lora import OpenedAdapters
from tgi_cli.engine.memory_plan import MemoryPlan, plan
from tgi_cli.engine.precision import with_activations
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu.weight_store import WeightStore
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder


class OpenedModel:
    """A model of which nothing but the headers has been read.

    Args:
        config: with `model_id` a local path.
        rank: whose part is to be built.
        num_threads: of the computation.
        weights_fd: shared memory for the packed weights of this rank; None takes private memory.

    Raises:
        EngineError: it is broken or of a kind we cannot run.
        UsageError: the configuration contradicts itself or the model.
    """

    def __init__(
        self, config: EngineConfig, *, rank: int, num_threads: int, weights_fd: int | None = None
    ) -> None:
        self.config = config
        self.rank = rank
        here = config.parallel.ranks(config.parallel.node_rank)
        self.backend = select(
            config.model.device, num_threads=num_threads, local_rank=rank - here[0]
        )
        opened = open_checkpoint(config.model.model_id)
        self.checkpoint = with_activations(opened, config, self.backend)
        self.checkpoint.partition(rank, config.parallel.num_shard)
        self.adapters = OpenedAdapters(config.lora, self.checkpoint)
        self._store: WeightStore | None = None
        if weights_fd is not None:
            self._store = self.backend.weight_store(weights_fd, self._fingerprint())
        self.plan: MemoryPlan = self._planned()

    def agree(self, kv_cache_tokens: int, max_model_len: int) -> None:
        """Plan again with the least of what fits on any rank."""
        self.config = msgspec.structs.replace(
            self.config,
            model=msgspec.structs.replace(self.config.model, max_model_len=max_model_len),
            cache=msgspec.structs.replace(self.config.cache, kv_cache_tokens=kv_cache_tokens),
        )
        self.plan = self._planned()

    def build(
        self,
        collective: Collective,
        progress: Callable[[float], None],
        grammars: GrammarCompiler | None = None,
    ) -> ModelRunner:
        """Read the weights, allocate the cache and put a runner around them.

        Args:
            collective: this rank's end.
            progress: called with the fraction of bytes read.
            grammars: for the rank that draws.
        """
        self.backend = replace(self.backend, collective=collective)
        self.checkpoint = self.checkpoint.for_length(self.plan.max_model_len)
        packer = self.backend.packer(
            self.checkpoint.spec, self.plan.dtype, self.plan.block_size, self._store
        )
        part = self.checkpoint.partition(self.rank, self.config.parallel.num_shard)
        kv_cache = KVCache(self.backend, part.local, self.plan)
        kv_cache.commit_first_pages()
        decoder = Decoder.build(
            self.checkpoint, self.backend, self.plan.dtype, progress=progress, packer=packer
        )
        bank = self.adapters.load(part, self.plan.dtype, self.backend.device)
        if bank is not None:
            decoder.attach(bank)
        return ModelRunner(
            decoder,
            self.backend,
            kv_cache,
            max_rows=self.config.scheduler.max_num_seqs,
            max_len=self.plan.max_model_len,
            block_size=self.plan.block_size,
            grammars=grammars,
            adapters=self.adapters.names,
        )

    def _fingerprint(self) -> str:
        """Of everything that this rank's packed weights depend on."""
        checkpoint, model = self.checkpoint, self.config.model
        format = checkpoint.format
        files = [(str(path), path.stat()) for path in checkpoint.files()]
        depends = (
            [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in files],
            [model.dtype, model.quantize, format.name, format.packs, format.wide_activations],
            [self.backend.name, self.config.cache.block_size],
            [self.rank, self.config.parallel.num_shard, __version__],
        )
        return hashlib.blake2b(repr(depends).encode(), digest_size=16).hexdigest()

    def _planned(self) -> MemoryPlan:
        kept = 0 if self._store is None else self._store.nbytes
        planned = plan(
            self.checkpoint,
            self.config,
            self.backend,
            rank=self.rank,
            kept=kept,
            adapter_bytes=self.adapters.nbytes,
        )
        planned.check()
        return planned
