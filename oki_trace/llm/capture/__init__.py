"""Captures hidden states, attention and the Logit Lens, and checks them."""
