"""Exports traces to files and imports them."""
