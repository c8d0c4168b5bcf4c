"""Weights, tokenizers and adapters in the file formats of others."""
