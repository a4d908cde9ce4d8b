"""The same model with other numbers: a copy whose weights no longer lie on a grid.

    python benchmarks/off_grid.py MODEL OUT

A model that was once stored in 4 bits is easy to quantize again: its weights lie on the old grid.
The copy computes the same function (which is checked) with norm gains folded into the matrices
behind them, and the residual stream turned by a fixed random orthogonal matrix. Both are exact for
models with a norm before each part and no offset in its gain; Gemma's norms behind the parts do not
commute with a rotation, so such models are refused. Rotation also takes outliers away: what helps
against outliers (AWQ, SmoothQuant) has less to do on the copy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Write the copy of the first argument into the second."""
    source, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(100, 228).unsqueeze(0) % model.config.vocab_size
    with torch.inference_mode():
        before = model(tokens).logits
        rotate(model)
        after = model(tokens).logits
    off = float((after - before).abs().max() / before.std())
    if off > 1e-3:
        raise SystemExit(f"the copy computes another function: logits differ by {off:.1e} sigma")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(f"{Path(out)}: logits differ by at most {off:.1e} of their deviation")


def rotate(model: Any) -> None:
    """Fold every gain and turn the residual stream, in place."""
    core, config = model.model, model.config
    if not hasattr(core.layers[0], "input_layernorm") or hasattr(
        core.layers[0], "pre_feedforward_layernorm"
    ):
        raise SystemExit(f"`{config.model_type}` has norms that a rotation does not commute with")
    turn = orthogonal(config.hidden_size)
    head = core.embed_tokens.weight.detach().clone()
    if not config.tie_word_embeddings:
        head = model.lm_head.weight.detach().clone()
    # Gains end in the head but not in the table, so they no longer are one matrix.
    config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(_in(head, core.norm, turn))
    core.norm.weight.fill_(1.0)
    core.embed_tokens.weight = torch.nn.Parameter(_out(core.embed_tokens.weight.T, turn).T)
    for layer in core.layers:
        attention, feed = layer.self_attn, layer.mlp
        for norm, readers, writer in (
            (
                layer.input_layernorm,
                (attention.q_proj, attention.k_proj, attention.v_proj),
                attention.o_proj,
            ),
            (layer.post_attention_layernorm, (feed.gate_proj, feed.up_proj), feed.down_proj),
        ):
            for reader in readers:
                reader.weight.copy_(_in(reader.weight, norm, turn))
            norm.weight.fill_(1.0)
            writer.weight.copy_(_out(writer.weight, turn))
            if writer.bias is not None:
                writer.bias.copy_(_out(writer.bias[:, None], turn)[:, 0])


def orthogonal(size: int) -> Tensor:
    """A fixed random orthogonal matrix [size, size] in float64."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turn, upper = torch.linalg.qr(matrix)
    return turn * upper.diagonal().sign()


def _in(weight: Tensor, norm: Any, turn: Tensor) -> Tensor:
    """A matrix that reads the stream behind `norm`."""
    return (weight.double() * norm.weight.double() @ turn).float()


def _out(weight: Tensor, turn: Tensor) -> Tensor:
    """A matrix that writes to the stream."""
    return (turn.T @ weight.double()).float()


if __name__ == "__main__":
    main()
