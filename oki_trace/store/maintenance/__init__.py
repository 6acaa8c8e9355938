"""Verifying, pruning, vacuuming and measuring a store."""
