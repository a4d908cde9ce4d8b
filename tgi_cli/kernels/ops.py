"""What a backend can compute: one documented signature per operation, no implementation.

`reference` implements all of them in plain torch and is the oracle; a backend overrides those it
has. Operations know tensors, not models: nothing here says "layer" or "family". Shapes use
T tokens of a ragged batch, S sequences, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Ops(Protocol):
    """The functions a backend offers. Pure unless the description says what is written."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square normalization over the last dimension, scaled by `weight`.

        The statistics are float32. The normalized row is rounded to `weight`'s dtype, scaled
        there, and rounded to `x`'s: a weight in the activations' dtype gives Llama's two
        roundings, a float32 weight gives Gemma's one.

        Args:
            x: [..., n].
            weight: [n], in `x`'s dtype or float32.
            eps: added to the mean square.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return `rms_norm(x + residual)` and the sum, which is rounded to `x`'s dtype first."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for x [..., n], weight [m, n] and bias [m], all of one dtype."""
        ...

    def embed(self, token_ids: Tensor, table: Tensor, scale: float | None = None) -> Tensor:
        """Rows `token_ids` [T] (int64) of `table` [vocab, n], times `scale`, in its dtype."""
        ...

    def rope_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope_table: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Rotate `q` and `k` in place by their positions, then store `k` and `v` in the cache.

        Rotation pairs element i with i + n/2 of the first n = rope_table.shape[1] elements of a
        head (the "half" convention of Hugging Face checkpoints); products and their sum are
        rounded to `q`'s dtype one by one.

        Args:
            q: [T, H, D], may be a view.
            k: [T, K, D], may be a view.
            v: [T, K, D].
            rope_table: [max_positions, n]: n/2 cosines, then n/2 sines, in `q`'s dtype.
            positions: [T] int64, each below max_positions.
            k_cache: [num_blocks, block_size, K, row_width]; written, rounded to its dtype as
                `kernels.kv_rows` says.
            v_cache: like `k_cache`; written.
            slot_mapping: [T] int64, block id * block_size + offset in the block.
        """
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of ragged queries over paged keys and values: [T, H, D].

        One signature for prompts, decodes and mixtures. Keys and values are read from the cache
        alone, also those of this step, so `rope_store` runs before. The queries of a sequence
        are its last ones: query j of n sits at position `seq_len - n + j` and sees the keys at
        positions p with `position - window < p <= position`. Softmax is in float32. What lies
        in masked slots (stale blocks, block 0) never reaches the result, not even NaN.

        Args:
            q: [T, H, D]; query head h reads key/value head h // (H / K).
            k_cache: [num_blocks, block_size, K, row_width], see `kernels.kv_rows`.
            v_cache: like `k_cache`.
            block_tables: [S, max_blocks] int32, block ids by absolute position; entries wholly
                behind the window or after the last key may be 0.
            seq_lens: [S] int32, keys of each sequence, this step's included.
            query_start: [S + 1] int32, first token row of each sequence.
            query_lens: the differences of `query_start` as Python numbers; all positive.
            key_lens: `seq_lens` as Python numbers.
            scale: factor on the scores.
            window: how many keys a query sees, itself included; None for all.
            softcap: scores become `softcap * tanh(score / softcap)`.
            sinks: [H]; a logit per head that takes part in the softmax and has no value.
            slopes: [H]; slope * (key position - query position) is added to the capped scores
                (ALiBi: Press, Smith and Lewis, "Train short, test long", 2022).
        """
        ...

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: Tensor
    ) -> None:
        """Add `scale * (x[rows] @ a.T) @ b` to `y[rows]`, in float32 and rounded once at the end.

        The product of two thin matrices by which LoRA (Hu et al., 2021) changes a linear layer;
        `b` is the transpose of what PEFT calls `lora_B`.

        Args:
            y: [T, m], may be a view; written.
            x: [T, n].
            a: [rank, n].
            b: [rank, m].
            scale: factor on the product.
            rows: [r] int64, each once.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` for gate_up [..., 2n] = gate then up; silu is rounded first."""
        ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """`gelu(gate) * up`, with the tanh approximation, for gate_up [..., 2n]."""
        ...

    def gumbel_noise(self, seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        """Standard Gumbel noise for every vocabulary id: [n, vocab_size] float32.

        Counter-based, so that a value depends on (seed, position, id) alone, never on the batch.
        Bit-exact definition, with Philox4x32-10 (Salmon et al., "Parallel random numbers: as
        easy as 1, 2, 3", SC 2011; multipliers 0xD2511F53 and 0xCD9E8D57, key increments
        0x9E3779B9 and 0xBB67AE85):

        - key = (low 32 bits, high 32 bits) of the seed;
        - counter = (id // 4, low 32 bits of the position, high 32 bits of it, 0);
        - r = lane id % 4 of the result, an unsigned 32-bit integer;
        - u = ((r >> 9) + 0.5) * 2**-23, exact in float32, in [2**-24, 1 - 2**-24];
        - noise = -log(-log(u)) in float64, rounded once to float32. Any log that is right to
          1 ulp gives the same bits, as no result comes so close to a tie, but for one of the
          2**23 values of u (r >> 9 = 3085996, noise 2.5e-8, whose last bit is then open).

        Args:
            seeds: [n] int64, the unsigned 64-bit seeds as two's complement.
            positions: [n] int64, output positions (0 is the first generated token).
            vocab_size: number of ids.
        """
        ...

    def gumbel_noise_at(self, seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
        """The values of `gumbel_noise` for chosen ids: token_ids [n, m] int64 -> [n, m]."""
        ...
