"""Reads files that may be malicious into a staging store, in a separate process."""
