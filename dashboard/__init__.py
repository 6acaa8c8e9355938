"""The explorer: pages that read the store, and queue replies in it for the worker."""
