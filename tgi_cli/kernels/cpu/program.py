"""A native program for a whole step of a dense decoder: one call instead of some 300.

Built from the parts of a decoder, which it repacks in place, tensor by tensor. The Python
composition stays callable and is the oracle. Not knowing a part means no program: `build` returns
None and the composition runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.adapters import AdapterTable
from tgi_cli.kernels.cpu.ahead import StepsAhead
from tgi_cli.kernels.cpu.library import (
    BLOCK,
    Context,
    LayerProgram,
    Matrix,
    Program,
    StepInput,
    pointer,
)
from tgi_cli.kernels.cpu.packed import (
    ROWS,
    PackedEmbedding,
    PackedHead,
    PackedWeight,
    interleave,
)
from tgi_cli.kernels.cpu.sampling import NativeSampling
from tgi_cli.kernels.grouped import GroupedRows
from tgi_cli.kernels.sampling import RowParameters

_ACTIVATIONS = {"silu": 3, "gelu_tanh": 4}  # Epilogue in csrc/kernels.h
_MAX_HEAD_DIM = 512
#: KvForm in csrc/kernels.h; tensors of `Backend.allocate_kv` are held in an order of its own.
KV_FORMS = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}


def reason_against(decoder: Any, block_size: int = BLOCK) -> str | None:
    """Why this decoder has no native program, or None if it has one."""
    spec = getattr(decoder, "spec", None)
    if spec is None:
        return "it is no composed decoder"
    if decoder.embedding is None or decoder.head is None:
        return "it is an inner stage of a pipeline"
    return reason_against_spec(spec, decoder.embedding.dtype, block_size)


def reason_against_spec(spec: Any, dtype: torch.dtype, block_size: int = BLOCK) -> str | None:
    """Why a whole decoder of this description would have no program, or None."""
    if block_size != BLOCK:
        return f"its KV blocks have {block_size} tokens and not {BLOCK}"
    if dtype != torch.bfloat16:
        return f"its dtype is {str(dtype).removeprefix('torch.')}"
    if spec.hidden_size % 16:
        return f"its hidden size {spec.hidden_size} is no multiple of 16"
    for layer in spec.layers:
        dim = layer.attention.head_dim
        if dim % 16 or dim > _MAX_HEAD_DIM:
            return f"its head size {dim} is no multiple of 16 up to {_MAX_HEAD_DIM}"
        if layer.feed.intermediate_size % 16:
            return f"its intermediate size {layer.feed.intermediate_size} is no multiple of 16"
        if layer.feed.activation not in _ACTIVATIONS:
            return f"its activation is {layer.feed.activation}"
    return None


class NativeStep:
    """Callable for one step: `Batch` and caches in, normalized hidden states out."""

    def __init__(self, context: Context, decoder: Any) -> None:
        self._context = context
        self.name = f"native-{context.variant}"
        self._spec = spec = decoder.spec
        self._kept: list[Tensor] = []  # what the program points to
        self._layers = (LayerProgram * len(spec.layers))()
        group_of = {i: g for g, group in enumerate(spec.kv_groups) for i in group.layers}
        tables: dict[int, Tensor] = {}
        for index, (layer, part) in enumerate(zip(decoder.layers, spec.layers, strict=True)):
            table = layer.attention.rope_table
            if id(table) not in tables:
                tables[id(table)] = self._keep(table.float())
            self._fill(self._layers[index], layer, part, group_of[index], tables[id(table)])
        self._program = self._ends(decoder)
        self._adapters = None if decoder.adapters is None else AdapterTable(decoder)
        if self._adapters is not None:
            self._program.adapters = self._adapters.slots
        self._caches: Sequence[tuple[Tensor, Tensor]] = ()
        attention = [part.attention for part in spec.layers]
        self._query_width = max(a.num_heads * a.head_dim for a in attention)
        self._wide = max(
            spec.hidden_size,
            max((a.num_heads + 2 * a.num_kv_heads) * a.head_dim for a in attention),
        )
        self._intermediate = max(part.feed.intermediate_size for part in spec.layers)
        groups = len(spec.kv_groups)
        self._step = StepInput(
            slots=(ctypes.c_void_p * groups)(),
            block_tables=(ctypes.c_void_p * groups)(),
            table_strides=(ctypes.c_int64 * groups)(),
        )
        self._workspace = 0
        self._grow(64)
        self._ahead_logits = torch.empty((0, spec.vocab_size))
        #: Steps of their own accord, None where what comes between logits and token is not native.
        self.ahead = None
        if self._ranks is None and spec.logit_softcap is None:
            self.ahead = StepsAhead(context)

    def __call__(self, batch: Any, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Run `batch`: [num_tokens, hidden_size] bfloat16; the caches are written."""
        step = self._input(batch, kv_caches)
        hidden = torch.empty((step.tokens, self._spec.hidden_size), dtype=torch.bfloat16)
        step.hidden, step.logit_rows = pointer(hidden), None
        self._run(step)
        return hidden

    def logits(self, batch: Any, kv_caches: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
        """Run `batch` for the logits of its `logit_rows` alone: [n, vocab_size] float32.

        What no logits depend on is left out: after the last layer's keys and values are stored,
        only those rows go on.

        Args:
            batch: see `model.batch.Batch`.
            kv_caches: written.
            out: [at least n, vocab_size] float32, contiguous; the result is its first rows.
        """
        step = self._input(batch, kv_caches)
        count = len(batch.logit_rows)
        if len(out) < count or out.shape[1] != self._spec.vocab_size:
            raise ValueError(
                f"logits of {count} rows need [{count}, {self._spec.vocab_size}], "
                f"not {list(out.shape)}"
            )
        step.hidden, step.logit_rows = pointer(self._buffers["narrow"]), pointer(batch.logit_rows)
        own = out if self._ranks is None else torch.empty((count, self._program.head.n))
        step.logits, step.num_logits = pointer(own), count
        if not step.logit_rows:  # torch gives an empty tensor no address
            step.logit_rows = pointer(batch.input_ids)
        self._run(step)
        if len(out) > count:  # slicing is slow after a step that has emptied the caches
            own, out = own[:count], out[:count]
        logits: Tensor = self._vocabulary.gather(own, out)
        cap = self._spec.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def start_ahead(
        self,
        batch: Any,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        sampling: NativeSampling,
        logit_rows: Any,
        steps: int,
    ) -> None:
        """Begin with `batch`, one token of each sequence, by `ahead`, which gives the results.

        Args:
            batch: see `model.batch.Batch`; its arrays may be used again at once.
            kv_caches: written.
            sampling: draws the tokens.
            logit_rows: `history`, `rows`, `history_lens` and `output_positions` for it; what is
                drawn is written behind the rows' `history.tokens`.
            steps: see `StepsAhead.want`.
        """
        ahead = self.ahead
        if ahead is None:
            raise ValueError("steps of this decoder are not native from end to end")
        step = self._input(batch, kv_caches)
        count, history = len(batch.logit_rows), logit_rows.history
        if len(self._ahead_logits) != count:
            self._ahead_logits = torch.empty((count, self._spec.vocab_size))
        step.hidden, step.logit_rows = pointer(self._buffers["narrow"]), pointer(batch.logit_rows)
        step.logits, step.num_logits = pointer(self._ahead_logits), count
        drawing = sampling.arguments(
            self._ahead_logits,
            history.tokens,
            logit_rows.rows,
            logit_rows.history_lens,
            logit_rows.output_positions,
        )
        ahead.start(
            self._program,
            step,
            drawing,
            groups=len(batch.groups),
            steps=steps,
            kept=(self, sampling, history, kv_caches),
        )

    def _run(self, step: StepInput) -> None:
        self._context.step(self._program, step)
        self._vocabulary.collective.check()

    def sampling(self, parameters: RowParameters) -> NativeSampling:
        """A sampler of its logits, on the same threads."""
        return NativeSampling(self._context, parameters)

    def _input(self, batch: Any, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> StepInput:
        """The one input struct, pointing to this batch; workspace is there already."""
        self._context.settle()  # it reads what may be made anew
        tokens = len(batch.input_ids)
        self._grow(tokens)
        self._point_at(kv_caches)
        step = self._step
        step.ids, step.positions = pointer(batch.input_ids), pointer(batch.positions)
        step.seq_lens, step.query_start = pointer(batch.seq_lens), pointer(batch.query_start)
        for index, group in enumerate(batch.groups):
            step.slots[index] = pointer(group.slot_mapping)
            step.block_tables[index] = pointer(group.block_tables)
            step.table_strides[index] = group.block_tables.stride(0)
        step.adapter_slots = pointer(batch.adapter_slots) if batch.adapters else None
        step.tokens, step.seqs = tokens, len(batch.seq_lens)
        return step

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else pointer(self._keep(tensor.float().contiguous()))

    def _pack(self, linear: Any, *, interleaved: bool = False) -> Matrix:
        """Repack a linear layer's matrix in place, unless a packer has done it."""
        linear.weight = self._packed(linear.weight, interleaved=interleaved)
        self._keep(linear.weight.data)
        matrix: Matrix = linear.weight.matrix
        return matrix

    def _packed(self, weight: Any, *, interleaved: bool = False) -> PackedWeight:
        if isinstance(weight, PackedWeight):
            return weight
        if isinstance(weight, GroupedRows):
            return PackedWeight.grouped(
                self._context,
                weight,
                interleaved=interleaved,
                wide_activations=weight.wide_activations,
            )
        dense = weight.dequantize().to(torch.bfloat16)
        return PackedWeight.dense(self._context, dense, interleaved=interleaved)

    def _fill(self, out: LayerProgram, layer: Any, part: Any, group: int, table: Tensor) -> None:
        attention, mlp, spec = layer.attention, layer.mlp, part.attention
        out.attention_norm = self._floats(layer.before_attention.weight)
        out.feed_norm = self._floats(layer.before_feed.weight)
        if part.wiring == "sandwich":
            out.after_attention_norm = self._floats(layer.after_attention.weight)
            out.after_feed_norm = self._floats(layer.after_feed.weight)
        out.qkv = self._pack(attention.qkv)
        out.qkv_bias = self._floats(getattr(attention.qkv, "bias", None))
        out.output = self._pack(attention.output)
        out.output_bias = self._floats(getattr(attention.output, "bias", None))
        out.gate_up = self._pack(mlp.gate_up, interleaved=True)
        bias = getattr(mlp.gate_up, "bias", None)
        out.gate_up_bias = self._floats(None if bias is None else interleave(bias))
        out.down = self._pack(mlp.down)
        out.down_bias = self._floats(getattr(mlp.down, "bias", None))
        if spec.qk_norm is not None:
            out.q_norm = self._floats(attention.heads.q_norm.weight)
            out.k_norm = self._floats(attention.heads.k_norm.weight)
            out.qk_eps = spec.qk_norm.eps
        out.cos_sin = pointer(table)
        out.heads, out.kv_heads, out.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        out.rotary_dim = table.shape[1]
        out.window, out.scale, out.softcap = spec.window or 0, spec.scale, spec.softcap or 0.0
        out.slopes, out.sinks = self._floats(attention.slopes), self._floats(attention.sinks)
        out.intermediate, out.group = part.feed.intermediate_size, group
        out.eps, out.activation = part.norm.eps, _ACTIVATIONS[part.feed.activation]

    def _ends(self, decoder: Any) -> Program:
        spec, embedding, head = self._spec, decoder.embedding, decoder.head
        blocks, own = getattr(embedding, "weight", None), getattr(head, "weight", None)
        if blocks is None and own is not None:
            table: Tensor = self._keep(embedding.table)
            matrix = Matrix(pointer(table), *table.shape, ROWS)
        else:  # where the head is tied, one packed copy serves both ends
            packed = (
                PackedWeight.dense(self._context, embedding.table)
                if blocks is None
                else self._packed(blocks)
            )
            self._keep(packed.data)
            matrix = packed.matrix
            decoder.embedding = PackedEmbedding(packed, embedding.scale)
            own = packed if own is blocks else own
        packed_head = own if isinstance(own, PackedWeight) else self._packed(own)
        self._keep(packed_head.data)
        decoder.head = PackedHead(packed_head)
        self._vocabulary = decoder.vocabulary
        self._ranks = self._vocabulary.native()  # kept, as the program points to it
        return Program(
            layers=self._layers,
            table=matrix,
            final_norm=self._floats(decoder.norm.weight),
            num_layers=len(spec.layers),
            hidden=spec.hidden_size,
            embedding_scale=1.0 if embedding.scale is None else embedding.scale,
            final_eps=decoder.norm.eps,
            head=packed_head.matrix,
            ranks=None if self._ranks is None else ctypes.addressof(self._ranks),
        )

    def _grow(self, tokens: int) -> None:
        """Workspace for so many tokens; doubled, so that it is rarely made anew."""
        if tokens <= self._workspace:
            return
        self._workspace = size = max(tokens, 2 * self._workspace)
        hidden, bf16 = self._spec.hidden_size, torch.bfloat16
        self._buffers = {
            "residual": torch.empty((size, hidden)),
            "wide": torch.empty((size, self._wide)),
            "narrow": torch.empty((size, hidden), dtype=bf16),
            "queries": torch.empty((size, self._query_width), dtype=bf16),
            "attended": torch.empty((size, self._query_width), dtype=bf16),
            "activated": torch.empty((size, self._intermediate), dtype=bf16),
        }
        if self._adapters is not None:
            self._buffers["gated"] = torch.empty((size, 2 * self._intermediate))
        for name, buffer in self._buffers.items():
            setattr(self._step, name, pointer(buffer))

    def _point_at(self, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        if kv_caches is self._caches:
            return
        for layer, (keys, values) in zip(self._layers, kv_caches, strict=True):
            if keys.shape[1] != BLOCK:
                raise ValueError(f"native kernels need blocks of {BLOCK} tokens")
            layer.k_cache, layer.v_cache = keys.data_ptr(), values.data_ptr()
            layer.kv_form = KV_FORMS[keys.dtype]
        self._caches = kv_caches
