"""The pages and their parts, a module each."""
