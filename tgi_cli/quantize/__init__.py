"""Quantization formats, and the methods that produce them."""
