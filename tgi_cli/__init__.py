"""tgi: download, quantize, launch, bench and chat with language models."""

__version__ = "0.1.0"
