"""Write a Llama folder's weights as a BF16 GGUF file, for servers that read nothing else.

    python -m benchmarks.gguf_model FOLDER TOKENIZER.gguf OUT-BF16.gguf

The tokenizer's metadata are copied from a GGUF file whose vocabulary the model has. Rows of q and k
are reordered as llama.cpp's converter does for Llama, whose rotary pairs lie side by side there.
`llama-quantize OUT-BF16.gguf OUT-Q8_0.gguf Q8_0` makes the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor to GGUF's."""
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[part.removesuffix('.weight')]}.weight"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves to pairs."""
    shape = (heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


def copy_tokenizer(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """All of `tokenizer.*`."""
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        kinds = field.types
        if kinds[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1])
        else:
            writer.add_key_value(key, field.contents(), kinds[0])


def main() -> None:
    """Read the arguments, write the file."""
    folder, tokenizer, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    copy_tokenizer(gguf.GGUFReader(tokenizer), writer)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    tensor = permuted(tensor, heads if "q_proj" in name else kv_heads)
                if tensor.dim() == 1:
                    writer.add_tensor(gguf_name(name), tensor.float().numpy())
                    continue
                writer.add_tensor(
                    gguf_name(name),
                    tensor.bfloat16().contiguous().view(torch.uint8).numpy(),
                    raw_dtype=gguf.GGMLQuantizationType.BF16,
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(out)


if __name__ == "__main__":
    main()
