"""The tensors of one step: one ragged layout for prompts, decodes and mixtures of both.

Built by the engine, read by the decoder. Knows no request and no scheduling. Frozen: a forward
pass that needs something else gets a new Batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupTables:
    """Where one KV group (layers that share block tables) keeps keys and values."""

    slot_mapping: Tensor  # [num_tokens] int64: block id * block_size + offset, where to store
    block_tables: Tensor  # [num_seqs, max_blocks] int32: block ids by absolute position, 0 = none


@dataclass(frozen=True, slots=True)
class Batch:
    """`num_tokens` rows of input, split over `num_seqs` sequences by `query_start`."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, absolute
    query_start: Tensor  # [num_seqs + 1] int32: tokens of sequence i are [i] .. [i + 1]
    seq_lens: Tensor  # [num_seqs] int32: keys visible after this step, this step's included
    groups: tuple[GroupTables, ...]  # per KV group, in the decoder's order
    logit_rows: Tensor  # [num_logits] int64: which of the num_tokens rows need logits
    adapter_slots: Tensor  # [num_seqs] int32: LoRA slot, 0 = none
    # The same lengths as Python numbers, so that nothing asks a device for them.
    query_lens: Sequence[int]
    key_lens: Sequence[int]
    adapters: Sequence[int] = ()  # `adapter_slots`; empty where no sequence has an adapter
