"""Traces leaving and entering the store as files."""
