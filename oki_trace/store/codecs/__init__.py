"""Encodes full tensors as compressed bytes, and decodes them."""
