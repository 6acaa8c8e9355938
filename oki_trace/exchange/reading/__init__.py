"""Reading files that may be hostile into a staging store, in a process of its own."""
