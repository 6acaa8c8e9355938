"""Finds and loads a model and its tokenizer."""
