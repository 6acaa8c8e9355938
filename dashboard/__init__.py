"""The explorer: pages that read the store and ask the worker through it."""
