"""The arithmetic of quantization: matrices and statistics in, codes and scales out. No models."""
