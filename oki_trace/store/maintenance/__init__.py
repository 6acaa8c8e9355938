"""Verifies, prunes and vacuums a store."""
