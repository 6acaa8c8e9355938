"""Writes conversations, steps and replies to the store."""
