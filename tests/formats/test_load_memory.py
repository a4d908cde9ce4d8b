"""What loading a model takes of memory at its peak, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tgi_cli.kernels.cpu import library

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SLACK = 80 << 20  # a tensor, what is in work on each thread, the KV cache, the growth of heaps

MEASURE = """
import json, sys
from pathlib import Path
from tgi_cli.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from tgi_cli.engine.core import EngineCore

def status(field):
    found = Path("/proc/self/status").read_text().split(field + ":")[1]
    return int(found.split()[0]) * 1024

config = EngineConfig(
    model=ModelConfig(model_id=sys.argv[1], device="cpu", quantize=sys.argv[2] or None),
    cache=CacheConfig(kv_cache_tokens=512),
    scheduler=SchedulerConfig(max_num_seqs=2, max_batch_tokens=32),
    parallel=ParallelConfig(num_threads=2),
)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
core = EngineCore.load(config, lambda phase, fraction: None)
print(json.dumps({
    "peak": status("VmHWM") - before,
    "weights": core.memory_plan.weights_bytes,
    "kernels": core.facts.backend,
    "transformers": "transformers" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 243 MB of zeros, which take no room on the disk."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    hidden, wide, vocab = 1024, 4096, 2048
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(7):
        prefix = f"model.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        for name, shape in (
            ("gate_proj", (wide, hidden)),
            ("up_proj", (wide, hidden)),
            ("down_proj", (hidden, wide)),
        ):
            shapes[f"{prefix}mlp.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for each in shape:
            size *= each
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.skipif(library.library_path() is None, reason="the native kernels are not built here")
@pytest.mark.parametrize("method", ["", "int8"])
def test_a_model_is_never_in_memory_twice(large: Path, method: str) -> None:
    """Neither as the file's pages nor as a copy beside the packed matrices."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), method],
        check=True,
        capture_output=True,
        text=True,
    )
    measured = json.loads(found.stdout)
    assert measured["kernels"].startswith("native-")
    assert measured["weights"] > (100 << 20)
    assert measured["peak"] > measured["weights"]  # what is compared is of one kind
    assert measured["peak"] < measured["weights"] + SLACK
    assert not measured["transformers"]
