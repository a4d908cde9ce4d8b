"""Whether two machines hold the same model: a digest of its files that costs no full read.

Weights count with their size and samples spread over them, so that models of one shape differ too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE = 32, 16 << 10  # per file of weights; bytes of each
#: What decides how the weights are read. Tokenizers are node 0's alone.
_CONFIGURATION = ("config.json", "quantize_config.json", "quant_config.json")
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def fingerprint(path: Path) -> str:
    """Digest of the configuration and weights of a model.

    Args:
        path: a folder, or a GGUF file.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(
            file
            for file in path.iterdir()
            if file.name in _CONFIGURATION or file.suffix in _WEIGHTS
        )
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= _SAMPLES * _SAMPLE:
                digest.update(opened.read())
                continue
            for index in range(_SAMPLES):
                opened.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()
