"""One rank's part of a model: opened and planned, then built. The same for rank 0 and the others.

Two steps, because all ranks agree on the size of the KV cache before any of them reads a weight.
Knows no other process: ranks meet in the collective that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from tgi_cli.config import EngineConfig
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.memory_plan import MemoryPlan, plan
from tgi_cli.engine.precision import with_activations
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.collective import Collective
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder


class OpenedModel:
    """A model of which nothing but the headers has been read.

    Args:
        config: with `model_id` a local path.
        rank: whose part is to be built.
        num_threads: of the computation.

    Raises:
        EngineError: it is broken or of a kind we cannot run.
        UsageError: the configuration contradicts itself or the model.
    """

    def __init__(self, config: EngineConfig, *, rank: int, num_threads: int) -> None:
        self.config = config
        self.rank = rank
        self.backend = select(config.model.device, num_threads=num_threads)
        opened = open_checkpoint(config.model.model_id)
        self.checkpoint = with_activations(opened, config, self.backend)
        self.checkpoint.partition(rank, config.parallel.num_shard)
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
        decoder = Decoder.build(self.checkpoint, self.backend, self.plan.dtype, progress=progress)
        return ModelRunner(
            decoder,
            self.backend,
            KVCache(self.backend, decoder.spec, self.plan),
            max_rows=self.config.scheduler.max_num_seqs,
            max_len=self.plan.max_model_len,
            block_size=self.plan.block_size,
            grammars=grammars,
        )

    def _planned(self) -> MemoryPlan:
        planned = plan(self.checkpoint, self.config, self.backend, rank=self.rank)
        planned.check()
        return planned
