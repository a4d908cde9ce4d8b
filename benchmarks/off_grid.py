"""The same model with other numbers: a copy whose weights no longer lie on a grid.

    python benchmarks/off_grid.py MODEL OUT
    python benchmarks/off_grid.py MODEL OUT --finetune 200

MODEL is a folder or a GGUF file. A model that was once stored in 4 bits is easy to quantize again:
its weights lie on the old grid. The copy, in bfloat16, computes the same function (which is
checked) with norm gains folded into the matrices behind them, and the residual stream turned by a
fixed random orthogonal matrix. Both are exact for models with a norm before each part.

The gains of Gemma's norms behind the parts do not commute with a rotation, but they do with a
permutation. There the stream is permuted, each value head is turned (and the output matrix's
inputs with it), and the inner features of the feed-forward part are permuted and rescaled, up
against down: no group of inputs keeps the scales it had. Rotation also takes outliers away: what
helps against outliers (AWQ, SmoothQuant) has less to do on a rotated copy.

With `--finetune` the weights leave the grid in another way, by that many steps of training on the
package's calibration text: another function, but one with its outliers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from tgi_cli.quantize.convert.calibration import shipped_text

RATE, LENGTH = 3e-5, 128  # of fine-tuning: what a step moves a weight by, tokens of a step


def main() -> None:
    """Write the copy of the first argument into the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--finetune", metavar="STEPS", type=int, help="train instead of turning")
    arguments = parser.parse_args()
    source, out = Path(arguments.model), arguments.out
    place: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if arguments.finetune is None:
        turned(model)
    else:
        text = tokenizer(shipped_text("calibration"), return_tensors="pt").input_ids[0]
        finetune(model, text, arguments.finetune)
    if source.suffix == ".gguf":  # dense since it was read, but still marked as it was stored
        del model.config.quantization_config
        model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for_older_readers(Path(out) / "config.json")
    print(out)


def turned(model: Any) -> None:
    """Turn it, and check that it still computes the same."""
    tokens = torch.arange(100, 228).unsqueeze(0) % model.config.vocab_size
    with torch.inference_mode():
        before = model(tokens).logits
        (permute if hasattr(model.model.layers[0], "pre_feedforward_layernorm") else rotate)(model)
        after = model(tokens).logits
    off = float((after - before).abs().max() / before.std())
    if off > 1e-3:
        raise SystemExit(f"the copy computes another function: logits differ by {off:.1e} sigma")
    print(f"logits differ by at most {off:.1e} of their deviation")


def finetune(model: Any, text: Tensor, steps: int) -> None:
    """Train on stretches of `text` [tokens] in turn, in place; products in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    starts = [step * LENGTH % (len(text) - LENGTH) for step in range(steps)]
    before = [part.detach().clone() for part in model.model.layers[0].parameters()]
    for step, start in enumerate(starts):
        rows = text[None, start : start + LENGTH]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: {float(loss):.3f} nats", flush=True)
    moved = [
        float((part - old).norm() / old.norm())
        for part, old in zip(model.model.layers[0].parameters(), before, strict=True)
        if part.dim() == 2
    ]
    print(f"the first layer's matrices moved by {min(moved):.3f} to {max(moved):.3f} of their norm")


def for_older_readers(path: Path) -> None:
    """Say RoPE's base where transformers 4 (AutoAWQ) looks for it; missing, it would be 10,000."""
    config = json.loads(path.read_text())
    theta = config.get("rope_parameters", {}).get("rope_theta")
    if theta is not None:
        path.write_text(json.dumps({**config, "rope_theta": theta}, indent=2) + "\n")


def rotate(model: Any) -> None:
    """Fold every gain and turn the residual stream, in place."""
    core, config = model.model, model.config
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


def permute(model: Any) -> None:
    """Do what Gemma's norms allow, in place. Its gains are stored less one."""
    core, config = model.model, model.config
    generator = torch.Generator().manual_seed(0)
    stream = torch.randperm(config.hidden_size, generator=generator)
    # One matrix still serves both ends: the last gain stays in its norm.
    core.embed_tokens.weight.copy_(core.embed_tokens.weight[:, stream])
    core.norm.weight.copy_(core.norm.weight[stream])
    turn = orthogonal(config.head_dim)
    for layer in core.layers:
        attention, feed = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.pre_feedforward_layernorm, (feed.gate_proj, feed.up_proj)),
        ):
            for reader in readers:
                reader.weight.copy_((reader.weight * (1.0 + norm.weight))[:, stream])
            norm.weight.zero_()
        for norm, writer in (
            (layer.post_attention_layernorm, attention.o_proj),
            (layer.post_feedforward_layernorm, feed.down_proj),
        ):
            writer.weight.copy_(writer.weight[stream])
            norm.weight.copy_(norm.weight[stream])
        values = attention.v_proj.weight.double().view(-1, config.head_dim, config.hidden_size)
        attention.v_proj.weight.copy_((turn.T @ values).flatten(0, 1).float())
        output = attention.o_proj.weight.double().view(config.hidden_size, -1, config.head_dim)
        attention.o_proj.weight.copy_((output @ turn).flatten(1).float())
        inner = torch.randperm(config.intermediate_size, generator=generator)
        sizes = 0.8 + 0.45 * torch.rand(config.intermediate_size, generator=generator)
        feed.gate_proj.weight.copy_(feed.gate_proj.weight[inner])
        feed.up_proj.weight.copy_(feed.up_proj.weight[inner] * sizes[:, None])
        feed.down_proj.weight.copy_(feed.down_proj.weight[:, inner] / sizes)


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
