"""A page or a part of one per module."""
