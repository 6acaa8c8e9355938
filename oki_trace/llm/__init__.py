"""A local language model, and what it does when it picks a token."""
