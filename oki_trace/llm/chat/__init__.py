"""Renders messages as a prompt, and splits a reply's tokens into parts."""
