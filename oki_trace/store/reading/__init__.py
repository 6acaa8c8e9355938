"""Reads the store and returns plain records."""
