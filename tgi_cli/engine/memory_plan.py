"""The memory plan: what a model will take on this machine, before a weight is read.

Weights, KV blocks of each group, the peak of a step's activations and the process itself, against
free memory. `tgi launch --dry-run` prints it, the engine follows it. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tgi_cli import model_path
from tgi_cli.config import EngineConfig
from tgi_cli.engine.block_table import KVGroupLayout
from tgi_cli.engine.logprobs import PROMPT_LOGITS
from tgi_cli.engine.lora import OpenedAdapters, fetched
from tgi_cli.engine.precision import (
    check_quantize,
    resolve_dtype,
    resolve_kv_dtype,
    with_activations,
)
from tgi_cli.errors import OutOfMemory, UsageError
from tgi_cli.kernels.backend import Backend, select
from tgi_cli.kernels.kv_rows import kv_dtype_name, row_width
from tgi_cli.kernels.reference import SCORES_AT_ONCE
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.partition import Partition
from tgi_cli.model.spec import DecoderSpec, KVGroup

#: A model is served if this many tokens fit, unless its own context is shorter.
MIN_CONTEXT = 256
#: Room for cached windows beside those in use, as a share of the latter.
_WINDOW_CACHE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KVGroupPlan:
    """One KV group. `num_blocks` includes the null block."""

    window: int | None
    num_layers: int
    num_blocks: int
    block_bytes: int  # of all its layers, keys and values

    @property
    def bytes(self) -> int:
        """Memory of the group."""
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes unless the name says otherwise; of a GPU's memory where the model runs on one.

    `baseline_bytes` is what this process holds already, so it is not in `needed_bytes`, which is
    compared with `free_bytes`. On a CPU, KV pages count against memory from their first use on.
    """

    device: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_model_len: int  # tokens
    block_size: int  # tokens
    kv_cache_tokens: int
    groups: tuple[KVGroupPlan, ...]
    weights_bytes: int  # adapters included
    adapter_bytes: int
    activation_bytes: int
    baseline_bytes: int
    free_bytes: int

    @property
    def kv_bytes(self) -> int:
        """All KV groups."""
        return sum(group.bytes for group in self.groups)

    @property
    def kv_blocks(self) -> int:
        """Blocks that sequences can hold, over all groups."""
        return sum(group.num_blocks - 1 for group in self.groups)

    @property
    def needed_bytes(self) -> int:
        """What the engine will take beyond what it has."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        """What the engine process will hold at its peak."""
        return self.baseline_bytes + self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether free memory is enough."""
        return self.needed_bytes <= self.free_bytes

    def layouts(self) -> tuple[KVGroupLayout, ...]:
        """The groups as the scheduler wants them."""
        return tuple(KVGroupLayout(group.window, group.num_blocks) for group in self.groups)

    def check(self) -> None:
        """Raise `OutOfMemory` with the numbers if the plan does not fit."""
        if self.fits:
            return
        raise OutOfMemory(
            f"the model needs {_gb(self.needed_bytes)} (weights {_gb(self.weights_bytes)},"
            f" KV cache of {self.kv_cache_tokens:,} tokens {_gb(self.kv_bytes)}, activations"
            f" {_gb(self.activation_bytes)}) and {_gb(self.free_bytes)} are free",
            hint=self._way_out(),
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, for `--dry-run --json`."""
        return {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kv_cache_dtype": kv_dtype_name(self.kv_dtype),
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "kv_cache_tokens": self.kv_cache_tokens,
            "kv_blocks": self.kv_blocks,
            "kv_groups": [
                {
                    "window": group.window,
                    "num_layers": group.num_layers,
                    "num_blocks": group.num_blocks,
                    "bytes": group.bytes,
                }
                for group in self.groups
            ],
            "weights_bytes": self.weights_bytes,
            "adapter_bytes": self.adapter_bytes,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "baseline_bytes": self.baseline_bytes,
            "needed_bytes": self.needed_bytes,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
        }

    def _way_out(self) -> str:
        if self.weights_bytes + self.activation_bytes > self.free_bytes:
            return "use a smaller or quantized model, or a machine with more memory"
        return "lower --max-model-len, --max-num-seqs or the size of the KV cache"


def plan_for(config: EngineConfig) -> MemoryPlan:
    """The plan of a configuration, fetching the model if it is not here; it may not fit.

    Raises:
        HubError: the model cannot be found or fetched.
        EngineError: the checkpoint is broken or of a kind we cannot run.
        UsageError: the configuration contradicts itself or the model.
    """
    check_config(config)
    path = model_path.resolve(config.model)
    backend = select(config.model.device)
    checkpoint = with_activations(open_checkpoint(str(path)), config, backend)
    adapters = OpenedAdapters(fetched(config), checkpoint)
    return plan(checkpoint, config, backend, adapter_bytes=adapters.nbytes)


def check_config(config: EngineConfig) -> None:
    """Raise `UsageError` for what this engine cannot do yet."""
    config.parallel.check()
    check_quantize(config.model.quantize)
    resolve_kv_dtype(config.cache.kv_cache_dtype, torch.bfloat16)


def plan(
    checkpoint: Checkpoint,
    config: EngineConfig,
    backend: Backend,
    *,
    rank: int = 0,
    kept: int = 0,
    adapter_bytes: Callable[[torch.dtype, Partition], int] = lambda dtype, part: 0,
) -> MemoryPlan:
    """Size the KV cache and add everything up. Call it before the weights are loaded.

    With several shards it is the plan of one rank, which may take its share of the memory that is
    free on its machine. `kept` bytes of its weights are in memory already, left by an engine that
    is gone.

    The pool holds `max_num_seqs` contexts, or what `memory_fraction` of the memory left by the
    weights allows, or exactly `kv_cache_tokens` if told. A context that was not asked for shrinks
    to the pool; one that was is kept, and the plan does not fit. `adapter_bytes` gives what the
    adapters take beside a rank's part of the model, held in the model's dtype.

    Raises:
        UsageError: a context longer than the model's or than the told cache, or a number of shards
            that the model does not divide into.
    """
    dtype = resolve_dtype(config.model.dtype, checkpoint.stored_dtype, backend.device)
    asked = config.model.max_model_len
    sized = checkpoint.for_length(asked or checkpoint.max_position_embeddings)
    max_len = asked or sized.max_position_embeddings
    told = config.cache.kv_cache_tokens
    if told is not None and asked is not None and told < asked:
        raise UsageError(
            f"the KV cache is to hold {told:,} tokens, less than one context of {asked:,}",
            hint="lower --max-model-len or raise the size of the KV cache",
        )
    parallel = config.parallel
    part = sized.partition(rank, parallel.num_shard)
    free = backend.free_memory(ranks=len(parallel.ranks(0))) + kept
    adapters = adapter_bytes(dtype, part)
    weights = sized.weights_bytes(dtype, part) + adapters
    native = backend.reason_against(part.local, dtype, config.cache.block_size) is None
    kv_dtype = resolve_kv_dtype(config.cache.kv_cache_dtype, dtype)
    sizing = _Sizing(
        part.local,
        config,
        dtype,
        kv_dtype,
        max_len,
        native=native,
        adapted=adapters > 0,
        holds_scores=backend.device.type != "cpu",
    )
    if told is not None:
        tokens = told
    else:
        budget = int(config.cache.memory_fraction * max(0, free - weights))
        tokens = min(sizing.most_tokens, sizing.tokens_within(budget))
        tokens = max(tokens, asked or min(max_len, MIN_CONTEXT))
    groups = sizing.groups(tokens)
    if asked is None:
        full = [group for group in groups if group.window is None]
        held = min((group.num_blocks - 1 for group in full), default=tokens)
        max_len = min(max_len, held * config.cache.block_size if full else max_len)
    return MemoryPlan(
        device=backend.device.type,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_len,
        block_size=config.cache.block_size,
        kv_cache_tokens=max(group.num_blocks - 1 for group in groups) * config.cache.block_size,
        groups=groups,
        weights_bytes=weights,
        adapter_bytes=adapters,
        activation_bytes=sizing.activations(tokens),
        baseline_bytes=backend.held_memory(),
        free_bytes=free,
    )


#: Held at once for each logit: itself and its processed form or log probability in float32, a
#: comparison with another (1 byte), and that widened to be counted (8 bytes).
_LOGIT_BYTES = 17


class _Sizing:
    """Arithmetic over one decoder and one configuration."""

    def __init__(
        self,
        spec: DecoderSpec,
        config: EngineConfig,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        max_len: int,
        *,
        native: bool,
        adapted: bool,
        holds_scores: bool,
    ) -> None:
        self._native = native
        self._adapted = adapted
        self._holds_scores = holds_scores  # of plain attention too
        self._spec = spec
        self._dtype = dtype
        self._kv_dtype = kv_dtype
        self._block_size = config.cache.block_size
        self._max_seqs = config.scheduler.max_num_seqs
        self._chunk = config.scheduler.max_batch_tokens
        self._max_len = max_len
        self.most_tokens = self._max_seqs * max_len

    def groups(self, tokens: int) -> tuple[KVGroupPlan, ...]:
        """The groups of a pool of `tokens`; a window group never exceeds what it can use."""
        return tuple(
            KVGroupPlan(
                window=group.window,
                num_layers=len(group.layers),
                num_blocks=1 + self._blocks(group, tokens),
                block_bytes=self._block_size * self._token_bytes(group) * len(group.layers),
            )
            for group in self._spec.kv_groups
        )

    def tokens_within(self, budget: int) -> int:
        """The largest pool, in tokens, that fits beside its activations; 0 if none does."""
        low, high = 0, -(-self.most_tokens // self._block_size)
        while low < high:
            middle = (low + high + 1) // 2
            tokens = middle * self._block_size
            kv = sum(group.bytes for group in self.groups(tokens))
            if kv + self.activations(tokens) <= budget:
                low = middle
            else:
                high = middle - 1
        return low * self._block_size

    def activations(self, tokens: int) -> int:
        """Peak of one step, in bytes."""
        spec, size = self._spec, self._dtype.itemsize
        chunk = min(self._chunk, max(tokens, 1))
        layers = 0
        for layer in spec.layers:
            attention = layer.attention
            heads = attention.num_heads + 2 * attention.num_kv_heads
            qkv = heads * attention.head_dim * size
            # gate, up, their product and the activation in between
            mlp = 4 * layer.feed.intermediate_size * size
            if self._adapted:  # gate and up apart from their GEMM, in float32
                mlp += 8 * layer.feed.intermediate_size
            layers = max(layers, qkv + mlp)
        # residual, its sum, the normalized row, and two float32 copies inside the norm
        rows = chunk * (spec.hidden_size * (3 * size + 8) + layers)
        drawn = min(self._max_seqs, chunk) * spec.vocab_size
        logits = max(drawn, min(chunk * spec.vocab_size, PROMPT_LOGITS)) * _LOGIT_BYTES
        return rows + max(logits, self._attention_scratch(tokens, chunk))

    def _attention_scratch(self, tokens: int, chunk: int) -> int:
        """Gathered keys and values of the layer that sees most, and float32 copies of them.

        Native attention reads the blocks where they are.
        """
        if self._native:
            return 0
        most = 0
        for group in self._spec.kv_groups:
            seen = min(self._max_len, group.window or self._max_len, max(tokens, 1))
            decode = min(tokens, self._max_seqs * seen)
            prompt = min(self._max_len, seen + chunk)
            elements = 2 * group.num_kv_heads * group.head_dim
            # codes of 8 bits are multiplied by their scales on the way
            size = 4 + self._kv_dtype.itemsize + (4 if self._kv_dtype.itemsize == 1 else 0)
            scores = max(self._scores(index, chunk, prompt) for index in group.layers)
            most = max(most, max(decode * elements * size, prompt * elements * size + scores))
        return most

    def _scores(self, index: int, chunk: int, keys: int) -> int:
        """What a layer's attention holds over a prompt beside the keys and values it gathers.

        Scores, their softmax before and after rows without keys are cleared, and masks; keys and
        values repeated for every query head.
        """
        part = self._spec.layers[index].attention
        if not (self._holds_scores or part.softcap is not None or part.sinks or part.alibi):
            return 0
        scores = min(part.num_heads * chunk * keys, SCORES_AT_ONCE)
        return 4 * (4 * scores + 2 * part.num_heads * part.head_dim * keys)

    def _token_bytes(self, group: KVGroup) -> int:
        width = row_width(group.head_dim, self._kv_dtype)
        return 2 * group.num_kv_heads * width * self._kv_dtype.itemsize

    def _blocks(self, group: KVGroup, tokens: int) -> int:
        """Blocks of one group in a pool of `tokens`, without the null block."""
        blocks = -(-tokens // self._block_size)
        if group.window is None:
            return blocks
        layout = KVGroupLayout(group.window, 0)
        each = layout.peak_blocks(self._max_len, 1, self._block_size)
        in_use = self._max_seqs * each + -(-self._chunk // self._block_size)
        return min(blocks, int(in_use * (1 + _WINDOW_CACHE_SHARE)))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
